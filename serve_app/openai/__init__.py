"""OpenAI's HTTP API over the engine protocol.

ingress.py    the Serve deployment around routes.py
routes.py     the endpoints
service.py    the path of one generation request; body.py reads its body
requests.py   request bodies, and their translation to the engine's nouns
tokenizer.py  prompts and conversations -> token ids
stream.py     the event streams of a request's choices -> one answer, streamed or whole
answers.py    engine events -> OpenAI's answer objects
"""
