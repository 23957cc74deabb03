// Use the service through `openai` for Node, and write down what each feature did.
//
//     node run_openai.mjs BASE_URL MODEL KEY_FILE OUTPUT PACKAGE_FILE
//
// PACKAGE_FILE is a file of the folder whose node_modules holds the package.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const [base, model, keyFile, output, packageFile] = process.argv.slice(2);
const { OpenAI } = createRequire(packageFile)('openai');
const apiKey = readFileSync(keyFile, 'utf8');
const client = new OpenAI({ baseURL: base, apiKey, maxRetries: 0 });
const question = { role: 'user', content: 'What does json.dumps do?' };
const short = { model, max_tokens: 12, temperature: 0 };
const results = {};

async function feature(name, run) {
  try {
    results[name] = { value: (await run()) ?? null };
  } catch (error) {
    const { status = null, code = null, message } = error;
    results[name] = { error: error.constructor.name, status, code, message };
  }
}
const chat = (fields = {}) =>
  client.chat.completions.create({ messages: [question], ...short, ...fields });
const said = (answer) => answer.choices[0].message.content;
const joined = async (chunks, text) => {
  let whole = '';
  for await (const chunk of chunks) whole += text(chunk.choices[0]) ?? '';
  return whole;
};

await feature('models', async () => {
  const ids = [];
  for await (const card of client.models.list()) ids.push(card.id);
  return ids;
});
await feature('chat_completion', async () => said(await chat()));
await feature('history', async () => {
  const answer = (await chat()).choices[0].message;
  return said(await chat({ messages: [question, answer, question] }));
});
await feature('stream', async () =>
  joined(await chat({ stream: true }), (choice) => choice?.delta?.content),
);
await feature('stream_usage', async () => {
  let usage = null;
  const asked = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await chat(asked)) usage = chunk.usage ?? usage;
  return usage.completion_tokens > 0;
});
await feature('stream_helper', async () => {
  const runner = client.chat.completions.stream({ messages: [question], ...short });
  let whole = '';
  runner.on('content', (piece) => (whole += piece));
  const final = said(await runner.finalChatCompletion());
  return [whole, final];
});
await feature('two_choices', async () =>
  (await chat({ n: 2, seed: 3, temperature: 1 })).choices.length,
);
await feature('logprobs', async () => {
  const answer = await chat({ logprobs: true, top_logprobs: 2 });
  return answer.choices[0].logprobs.content[0].top_logprobs.length;
});
await feature('completion', async () =>
  (await client.completions.create({ prompt: 'json.dumps(', ...short })).choices[0].text,
);
await feature('completion_stream', async () => {
  const chunks = await client.completions.create({ prompt: 'json.dumps(', stream: true, ...short });
  return joined(chunks, (choice) => choice?.text);
});
await feature('completion_of_token_ids', async () =>
  (await client.completions.create({ prompt: [5, 6, 7], ...short })).usage.prompt_tokens,
);
await feature('raw_response', async () => {
  const { data, response } = await chat().withResponse();
  return [response.headers.get('x-request-id') === data._request_id, said(data)];
});
await feature('crowd', async () => {
  const answers = await Promise.all(Array.from({ length: 8 }, () => chat()));
  return [...new Set(answers.map(said))];
});
await feature('abort', async () => {
  const chunks = await chat({ stream: true, max_tokens: 2000, ignore_eos: true });
  let read = 0;
  for await (const chunk of chunks) if (++read === 3 && chunk) chunks.controller.abort();
  return [read, said(await chat())];
});
await feature('overload_with_retries', async () => {
  const patient = { maxRetries: 20 };
  const body = { ...short, prompt: 'a', max_tokens: 48, ignore_eos: true };
  const ask = () => client.completions.create(body, patient);
  return (await Promise.all(Array.from({ length: 40 }, ask))).length;
});
await feature('timeout', () =>
  client.chat.completions.create(
    { messages: [question], ...short, max_tokens: 1000, ignore_eos: true },
    { timeout: 50 },
  ),
);
await feature('wrong_key', () =>
  new OpenAI({ baseURL: base, apiKey: 'wrong', maxRetries: 0 }).models.list(),
);
await feature('unknown_model', () => chat({ model: 'another' }));
await feature('tools', () =>
  chat({ tools: [{ type: 'function', function: { name: 'f', parameters: {} } }] }),
);
await feature('json_schema', () =>
  client.chat.completions.parse({
    messages: [question],
    ...short,
    response_format: { type: 'json_schema', json_schema: { name: 'x', schema: {} } },
  }),
);
await feature('embeddings', () => client.embeddings.create({ model, input: 'a' }));
await feature('responses', () => client.responses.create({ model, input: 'a' }));

writeFileSync(output, JSON.stringify(results, null, 2));
