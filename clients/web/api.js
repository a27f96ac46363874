// The server's API. The key is in a variable of this module and nowhere else.

let key = "";
let asking = null;
let askForKey = () => Promise.reject(new Error("no key"));

/** A failure that the server names, or that there is no server. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** `ask(wrong)` is called where the server wants a key; it resolves to one, or to null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** The JSON of a reply: GET without a body, POST with one. Raises ApiError. */
export async function call(path, body) {
  const response = await request(path, body);
  return response.json();
}

/** The objects of a stream of server-sent events. Raises ApiError, and AbortError where `signal` says so. */
export async function* stream(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the stream broke off before its end");
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      yield chunk;
    }
  }
}

async function request(path, body, signal) {
  const used = key;
  const headers = { ...(used && { Authorization: `Bearer ${used}` }), ...(body && { "Content-Type": "application/json" }) };
  const options = { method: body ? "POST" : "GET", headers, signal, credentials: "omit" };
  let response;
  try {
    response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running?");
  }
  if (response.status === 401) {
    await newKey(used);
    return request(path, body, signal);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** Several requests that need a key ask for it once. */
async function newKey(used) {
  if (key !== used) return;
  asking ??= askForKey(used !== "").finally(() => { asking = null; });
  const given = await asking;
  if (given === null) throw new ApiError("The server answers only with a key.", 401);
  key = given;
}

async function failure(response) {
  const seconds = response.headers.get("Retry-After");
  const later = seconds ? ` (try again in ${seconds} s)` : "";
  try {
    const { error } = await response.json();
    return new ApiError(error.message + later, response.status);
  } catch {
    return new ApiError(`The server answered ${response.status}${later}.`, response.status);
  }
}
