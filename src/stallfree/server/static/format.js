// Numbers as people read them.

const whole = new Intl.NumberFormat("en");

/** Seconds: "72 ms", "1.24 s", "34 s". */
export function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 9.995 ? `${seconds.toFixed(2)} s` : `${seconds.toFixed(1)} s`;
}

/** A whole number: "1,500". */
export function count(number) {
  return whole.format(Math.round(number));
}

/** A rate: one digit after the point while it is small. */
export function rate(number) {
  return number < 10 ? number.toFixed(1) : count(number);
}

/** A share of 1: "98.7 %", "42 %", "0.3 %"; only what is all of it is "100 %". */
export function percent(share) {
  const isExtreme = (share > 0 && share < 0.1) || (share >= 0.9 && share < 1);
  const text = (Math.floor(share * 1000) / 10).toFixed(isExtreme ? 1 : 0);
  return `${text} %`;
}

/** "1 request", "2 requests". */
export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** The part of a request's id by which people can tell it from others. */
export function shortId(id) {
  const [head, completion] = id.split("/");
  const name = head.replace(/^(\d+ )?[a-z]+-/, ""); // replicas number them
  const [body, prompt] = name.split("-");
  const place = (prompt && prompt !== "0") || (completion && completion !== "0");
  return body.slice(0, 6) + (place ? `·${prompt ?? 0}/${completion ?? 0}` : "");
}

/** The next "round" number at or above one: one of `steps`, and zeros. */
export function roundUp(number, steps = [1, 2, 5, 10]) {
  if (!(number > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(number));
  return steps.find((each) => number <= each * unit * 1.0000001) * unit;
}

/** The top of a scale that holds a number. */
export function scaleTop(number) {
  return roundUp(number, [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]);
}
