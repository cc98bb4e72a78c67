// Sign jobs for heimdex-clip-worker with Web Crypto: Node 20, Deno, Bun, Supabase Edge Functions, browsers.
// It follows the test vectors: `node sign.mjs test_vectors.json` checks it.

const utf8 = new TextEncoder();
const hex = (bytes) => Array.from(new Uint8Array(bytes), (b) => b.toString(16).padStart(2, "0")).join("");

async function hmac(secret, message) {
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const key = await crypto.subtle.importKey("raw", utf8.encode(secret), algorithm, false, ["sign"]);
  return hex(await crypto.subtle.sign("HMAC", key, utf8.encode(message)));
}

// Keys sorted by code unit, no spaces, whole numbers only: the canonical form that version 2 signs.
export function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value !== null && typeof value === "object") {
    const pairs = Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`);
    return `{${pairs.join(",")}}`;
  }
  if (typeof value === "number" && !Number.isSafeInteger(value)) throw new Error("only whole numbers can be signed");
  if (typeof value === "string" && !value.isWellFormed()) throw new Error("a lone surrogate cannot be signed");
  return JSON.stringify(value);
}

// Version 1: one image.
export async function signV1(imageUrl, secret, ts = Math.floor(Date.now() / 1000)) {
  return { ts, sig: await hmac(secret, `${imageUrl}|${ts}`) };
}

// Version 2: a whole input, without its `auth`.
export async function signV2(input, { kid, secret, audience = "heimdex-clip", ts, exp, nonce }) {
  ts ??= Math.floor(Date.now() / 1000);
  exp ??= ts + 900;
  nonce ??= crypto.randomUUID();
  const digest = hex(await crypto.subtle.digest("SHA-256", utf8.encode(canonical(input))));
  const message = ["CLIPW-HMAC-SHA256-V2", audience, kid, ts, exp, nonce, digest].join("\n");
  return { v: 2, kid, ts, exp, nonce, sig: await hmac(secret, message) };
}

async function check(path) {
  const { readFile } = await import("node:fs/promises");
  const vectors = JSON.parse(await readFile(path, "utf8"));
  let wrong = 0;
  for (const row of vectors.canonical) wrong += canonical(row.value) !== row.canonical;
  for (const row of vectors.v1) {
    wrong += (await signV1(row.image_url, row.secret, row.ts)).sig !== row.auth.sig;
  }
  for (const row of vectors.v2) wrong += (await signV2(row.input, row)).sig !== row.auth.sig;
  const count = vectors.canonical.length + vectors.v1.length + vectors.v2.length;
  console.log(`${count - wrong} of ${count} test vectors agree`);
  if (wrong) process.exitCode = 1;
}

if (globalThis.process?.argv?.[2]?.endsWith(".json")) await check(process.argv[2]);
