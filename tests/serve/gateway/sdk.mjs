// What the official Node client sees of an endpoint, as one line of JSON. Usage: node sdk.mjs URL
import OpenAI from "openai";

const client = (key) => new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: key, maxRetries: 0, timeout: 60_000 });
const api = client("secret");
const messages = [{ role: "user", content: "狐狸在河边唱歌。The fox sings." }];
const fields = { model: "tiger", messages, max_tokens: 16, seed: 7, verify: false, creativity: 0.4 };
const refusal = async (asking) => {
  try {
    await asking;
    return null;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
};

const whole = await api.chat.completions.create({ ...fields, logprobs: true, top_logprobs: 2 });
let streamed = "", finish = null, spent = null, chunks = 0, nameless = 0;
const stream = await api.chat.completions.create({ ...fields, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  chunks += 1;
  if (!chunk.choices.length && !chunk.usage) nameless += 1;
  streamed += chunk.choices[0]?.delta?.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  spent = chunk.usage ?? spent;
}
const held = await api.chat.completions.stream({ ...fields, verify: true }).finalChatCompletion();
const leaving = await api.chat.completions.create({ ...fields, max_tokens: 90, stream: true });
for await (const chunk of leaving) {
  if (chunk.choices[0]?.delta?.content) break; // aborts the request
}
const vectors = await api.embeddings.create({ model: "tiger", input: ["你好", "fox"] });
const numbers = await api.embeddings.create({ model: "tiger", input: ["你好", "fox"], encoding_format: "float" });

console.log(
  JSON.stringify({
    text: whole.choices[0].message.content,
    verdict: whole.ensemble.verdict,
    logprobs: whole.choices[0].logprobs.content.length,
    requestId: whole._request_id,
    usage: whole.usage.completion_tokens,
    streamed,
    finish,
    spent: spent?.completion_tokens,
    chunks,
    nameless,
    held: held.choices[0].message.content,
    plain: (await api.completions.create({ model: "tiger", prompt: "The fox", max_tokens: 3 })).choices[0].text,
    models: (await api.models.list()).data.map((model) => model.id),
    model: (await api.models.retrieve("tiger")).id,
    widths: vectors.data.map((row) => row.embedding.length),
    apart: Math.max(...vectors.data[0].embedding.map((x, at) => Math.abs(x - numbers.data[0].embedding[at]))),
    wrongKey: await refusal(client("wrong").models.list()),
    wrongModel: await refusal(api.chat.completions.create({ ...fields, model: "other" })),
    wrongField: await refusal(api.chat.completions.create({ ...fields, temperature: 9 })),
    wrongInput: await refusal(api.embeddings.create({ model: "tiger", input: [] })),
  }),
);
