// How numbers are written.

const MINUS = "−";

/** Three digits that count, or a dash. */
export function number(x, digits = 3) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x),
    sign = x < 0 ? MINUS : "";
  if (size >= 1e6 || size < 1e-4)
    return (
      sign +
      size
        .toExponential(digits - 1)
        .replace("e+", "e")
        .replace("e-", `e${MINUS}`)
    );
  const fixed = Math.min(6, Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
  return sign + size.toFixed(fixed).replace(/\B(?=(\d{3})+(?!\d))(?<!\.\d*)/g, ",");
}

/** As `number`, with a sign in any case. */
export const signed = (x, digits = 3) => (x > 0 ? "+" : "") + number(x, digits);

/** A value with two digits after the point, so that columns line up. */
export const fixed = (x, digits = 2) =>
  x === null || !Number.isFinite(x) ? "–" : (x < 0 ? MINUS : "") + Math.abs(x).toFixed(digits);

/** A value in little room. */
export const short = x => fixed(x, Math.abs(x) >= 100 ? 0 : Math.abs(x) >= 0.995 ? 1 : 2);

/** A count. */
export const whole = n => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en"));

/** A share as per cent. */
export const percent = (x, digits = 3) =>
  x === null || x === undefined || !Number.isFinite(x) ? "–" : `${number(100 * x, digits)} %`;

/** A large number in short: 12.3M. */
export function brief(n) {
  if (n === null || n === undefined) return "–";
  for (const [size, letter] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ])
    if (Math.abs(n) >= size) return `${Number((n / size).toPrecision(3))}${letter}`;
  return Number.isInteger(n) ? String(n).replace("-", MINUS) : number(n);
}

/** A number of an axis, without zeros at its end. */
export const tick = x => String(Number(x.toPrecision(3))).replace("-", MINUS);

/** About `n` round numbers that cover `[low, high]`. */
export function ticks(low, high, n = 5) {
  if (!(high > low)) return [low];
  const raw = (high - low) / n,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(x => x * power >= raw * 0.999);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-9; x += step)
    found.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return found;
}
