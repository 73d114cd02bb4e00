// The endpoint as the page uses it: a streamed chat completion, and the live numbers. Errors carry what a reader needs.

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

// Chunks of a streamed answer. Aborting `signal` closes the connection, which frees the slot on the server.
export async function* chat(body, { key, signal }) {
  const response = await send("v1/chat/completions", { method: "POST", key, signal, body: JSON.stringify(body) });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      throw new ApiError("", { code: "broken" });
    });
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code || "" });
      yield chunk;
    }
  }
  throw new ApiError("", { code: "broken" });
}

export async function liveNumbers(key) {
  return (await send("v1/live", { key, signal: AbortSignal.timeout(5000) })).json();
}

async function send(path, { key, ...options }) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", { code: "network" });
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const after = Number.parseFloat(response.headers.get("retry-after"));
  throw new ApiError(told.error?.message || `HTTP ${response.status}`, {
    status: response.status,
    code: told.error?.code || "",
    retryAfter: Number.isFinite(after) ? Math.max(0, Math.ceil(after)) : null,
  });
}
