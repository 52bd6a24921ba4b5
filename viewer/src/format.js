// Numbers and tokens as people read them; the same rules as analysis/highlights.py.

/** A number with three digits that mean something. @param {number | null | undefined} value */
export function number(value) {
  if (value === null || value === undefined) return '–';
  if (value === 0 || !Number.isFinite(value)) return value === 0 ? '0' : String(value);
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return minus(value.toExponential(1).replace('e+', 'e'));
  return minus(size >= 1000 ? value.toFixed(0) : value.toPrecision(3));
}

/** A number with this many digits behind the point. @param {number | null | undefined} value @param {number} [digits] */
export function fixed(value, digits = 3) {
  return value === null || value === undefined ? '–' : minus(value.toFixed(digits));
}

/** A share in per cent. @param {number | null | undefined} share */
export function percentage(share) {
  return share === null || share === undefined ? '–' : `${number(100 * share)}%`;
}

/** A whole number, its thousands apart. @param {number | null | undefined} value */
export function count(value) {
  return value === null || value === undefined ? '–' : value.toLocaleString('en-US');
}

/** The hyphen of a number as a minus sign, which is as wide as a digit. @param {string} text */
export function minus(text) {
  return text.replace(/-/g, '−');
}

/** @param {string} word @param {number} n */
export function plural(n, word) {
  return `${count(n)} ${word}${n === 1 ? '' : 's'}`;
}

/** Round marks of an axis between two limits. @param {number} low @param {number} high @param {number} [n] */
export function ticks(low, high, n = 5) {
  const rough = (high - low) / n;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * (/** @type {number} */ ([1, 2, 5, 10].find((m) => m * power >= rough * 0.999)));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

const GLYPHS = /** @type {Record<string, string>} */ ({ '\n': '↵', '\t': '⇥', '\r': '␍' });

/** What a token writes, with all that is invisible made visible; spaces inside a word stay. @param {string} text */
export function visible(text) {
  if (text !== '' && /^ +$/.test(text)) return '·'.repeat(text.length);
  return text.replace(/[\n\t\r]/g, (c) => GLYPHS[c]).replace(
    // Control characters, and those that change the direction of the text after them.
    /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => `\\u${/** @type {number} */ (c.codePointAt(0)).toString(16).padStart(4, '0')}`,
  );
}

/** Bytes as they are written: `⟨E2⟩⟨82⟩`. @param {Uint8Array} bytes */
export function byteText(bytes) {
  return [...bytes].map((byte) => `⟨${byte.toString(16).toUpperCase().padStart(2, '0')}⟩`).join('');
}
