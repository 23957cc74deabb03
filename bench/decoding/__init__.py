"""What bench/peers_decode.py and bench/served_decode.py are made of.

ds3.py        the model of both: 706 M parameters, random weights, and our engines of it
vocabulary.py its tokenizer
"""
