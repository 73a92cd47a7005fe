// Server-sent events read with fetch(), which unlike EventSource can send a key.

const KEY = "stallfree-key";

/** The API key of this tab, or null. It lasts as long as the tab. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is no stream of events; `status` is that of HTTP. */
export class RefusedError extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** fetch() with the key; anything but 2xx raises a RefusedError with the server's own words. */
export async function ask(path, options = {}) {
  const value = key.get();
  const headers = { ...options.headers, ...(value ? { Authorization: `Bearer ${value}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not JSON: a proxy's page
  }
  throw new RefusedError(message, response.status, Number(response.headers.get("Retry-After")) || 0);
}

/** The data of each event of a response, as text. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
