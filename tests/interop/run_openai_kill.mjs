// Read answers through `openai` for Node while the replica that makes them is killed.
//
//     node run_openai_kill.mjs BASE_URL MODEL KEY_FILE OUTPUT PACKAGE_FILE
//
// PACKAGE_FILE is a file of the folder whose node_modules holds the package. The client is as it
// comes, its own retries included. What is said on stdin and stdout: disturbing.py.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const [base, model, keyFile, output, packageFile] = process.argv.slice(2);
const { OpenAI } = createRequire(packageFile)('openai');
const client = new OpenAI({ baseURL: base, apiKey: readFileSync(keyFile, 'utf8') });
const messages = [{ role: 'user', content: 'What does json.dumps do?' }];
const long = { model, messages, max_tokens: 1500, ignore_eos: true };
const greedy = { ...long, temperature: 0 };
const seeded = { ...long, temperature: 1, seed: 7 };
const usage = { stream_options: { include_usage: true } };
const BEGUN = 5;
const results = {};
const said = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function told(ask, begun) {
  try {
    return await ask(begun);
  } catch (error) {
    return { error: String(error) };
  }
}
async function twice(name, ask) {
  const calm = await told(ask, () => {});
  console.log('ready');
  await said.next();
  results[name] = { calm, disturbed: await told(ask, () => console.log('begun')) };
}
const counts = (used) => [used.prompt_tokens, used.completion_tokens, used.total_tokens];

await twice('greedy_stream', async (begun) => {
  const asked = { ...greedy, ...usage, stream: true, logprobs: true, top_logprobs: 2 };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create(asked)) {
    chunks.push(chunk);
    if (chunks.length === BEGUN) begun();
  }
  const choices = chunks.flatMap((chunk) => chunk.choices);
  const entries = choices.flatMap((choice) => choice.logprobs?.content ?? []);
  return {
    text: choices.map((choice) => choice.delta.content ?? '').join(''),
    finish_reasons: choices.map((choice) => choice.finish_reason).filter(Boolean),
    num_ids: new Set(chunks.map((chunk) => chunk.id)).size,
    roles: choices.map((choice) => choice.delta.role).filter(Boolean),
    usage: counts(chunks.at(-1).usage),
    logprobs: [entries.map((entry) => entry.token).join(''), entries.length],
  };
});
// With the helper that puts the chunks together itself.
await twice('seeded_stream', async (begun) => {
  const runner = client.chat.completions.stream({ ...seeded, ...usage });
  const ids = new Set();
  let read = 0;
  runner.on('chunk', (chunk) => {
    ids.add(chunk.id);
    if (++read === BEGUN) begun();
  });
  const final = await runner.finalChatCompletion();
  return {
    text: final.choices[0].message.content,
    finish_reasons: [final.choices[0].finish_reason],
    num_ids: ids.size,
    usage: counts(final.usage),
  };
});
await twice('greedy_whole', async (begun) => {
  begun();
  const answer = await client.chat.completions.create(greedy);
  return {
    text: answer.choices[0].message.content,
    finish_reasons: answer.choices.map((choice) => choice.finish_reason),
    usage: counts(answer.usage),
  };
});

writeFileSync(output, JSON.stringify(results));
process.exit(0);
