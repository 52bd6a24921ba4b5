// Counts of values in bins. Every bin is equally wide on the screen, whatever its edges are.
import { useRef, useState } from 'preact/hooks';
import { count, minus, number, percentage, ticks } from '../format.js';
import { hideTip, showTip } from './tip.js';

/** @typedef {{edges: number[], counts: number[]}} Bins */
/**
 * How the edges are read: as they are; as powers of ten of which they are the exponents; or as values whose
 * logarithms are equally far apart.
 * @typedef {'linear' | 'exponents' | 'logarithmic'} EdgeScale
 */

/**
 * @typedef {object} HistogramProps
 * @property {Bins} bins
 * @property {string} label what is counted
 * @property {EdgeScale} [edges]
 * @property {boolean} [signed] bins below 0 in the colour of negative values
 * @property {[number, number] | null} [range] the edges that are chosen
 * @property {(range: [number, number] | null) => void} [onRange] makes the bars buttons
 * @property {number} [height]
 * @property {boolean} [linear] heights as they are, rather than their logarithms
 */

/** @param {HistogramProps} props */
export function Histogram({ bins, label, edges: scale = 'linear', signed = false, range = null, onRange, height = 96, linear = false }) {
  const { edges, counts } = bins;
  const [at, setAt] = useState(-1);
  const from = useRef(-1); // where a choice of several bars began
  const box = useRef(/** @type {HTMLDivElement | null} */ (null));
  const total = counts.reduce((sum, n) => sum + n, 0);
  const heightOf = linear ? (/** @type {number} */ n) => n : (/** @type {number} */ n) => Math.log1p(n);
  const most = Math.max(1, ...counts);
  const shown = (/** @type {number} */ value) => (scale === 'exponents' ? power(value) : number(value));
  const name = (/** @type {number} */ i) => `${shown(edges[i])} to ${shown(edges[i + 1])}`;
  const stop = Math.max(0, at >= 0 ? at : counts.indexOf(most));

  /** @param {number} i @param {boolean} more */
  function choose(i, more) {
    if (!onRange) return;
    if (!more || from.current < 0) from.current = i;
    const [low, high] = [Math.min(from.current, i), Math.max(from.current, i)];
    const same = range && range[0] === edges[low] && range[1] === edges[high + 1];
    onRange(same && !more ? null : [edges[low], edges[high + 1]]);
  }
  /** @param {KeyboardEvent} event */
  function onKeyDown(event) {
    const step = event.key === 'ArrowLeft' ? -1 : event.key === 'ArrowRight' ? 1 : 0;
    if (step) {
      const next = Math.min(Math.max(stop + step, 0), counts.length - 1);
      setAt(next);
      /** @type {HTMLElement} */ (box.current?.children[next]).focus();
      if (event.shiftKey) choose(next, true);
    } else if (event.key === 'Escape' && range) onRange?.(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
  /** @param {Element} target @param {number} i */
  const tip = (target, i) => showTip(target, [count(counts[i]), name(i), `${percentage(counts[i] / Math.max(total, 1))} of ${count(total)}`]);
  /** @param {PointerEvent} event */
  const barAt = (event) => Number(event.target instanceof Element ? (event.target.closest('[data-bin]')?.getAttribute('data-bin') ?? -1) : -1);
  const bars = counts.map((n, i) => {
    const chosen = range !== null && edges[i] >= range[0] && edges[i + 1] <= range[1];
    const part = <i style={{ height: n ? `max(2px, ${((100 * heightOf(n)) / heightOf(most)).toFixed(2)}%)` : '0' }} />;
    const shared = {
      key: i,
      class: `bar${signed && edges[i + 1] <= 0 ? ' negative' : ''}${range ? (chosen ? ' chosen' : ' other') : ''}`,
      'data-bin': i,
      'data-count': n,
      onMouseEnter: (/** @type {any} */ event) => tip(event.currentTarget, i),
    };
    if (!onRange) return <span {...shared}>{part}</span>;
    return (
      <button
        type="button" {...shared} tabIndex={i === stop ? 0 : -1} aria-pressed={chosen} aria-label={`${name(i)}: ${count(n)}`}
        onFocus={(event) => { setAt(i); if (event.currentTarget.matches(':focus-visible')) tip(event.currentTarget, i); }}
        onBlur={hideTip} onClick={(event) => event.detail === 0 && choose(i, event.shiftKey)}
      >{part}</button>
    );
  });
  return (
    <div class="histogram">
      <div class="bars-box">
        <span class="most soft">{count(most)}</span>
        <div
          class="bars" ref={box} role={onRange ? 'group' : 'img'} style={{ height: `${height}px` }} aria-label={onRange ? label : `${label}: ${summary(bins, name)}`}
          onMouseLeave={hideTip} onKeyDown={onRange ? onKeyDown : undefined}
          onPointerDown={onRange ? (event) => { const i = barAt(event); if (i >= 0) { const box = event.currentTarget; if (box.hasPointerCapture(event.pointerId)) box.releasePointerCapture(event.pointerId); choose(i, event.shiftKey); } } : undefined}
          onPointerOver={onRange ? (event) => { const i = barAt(event); if (event.buttons === 1 && i >= 0 && from.current >= 0 && i !== from.current) choose(i, true); } : undefined}
        >
          {bars}
        </div>
      </div>
      <div class="axis" aria-hidden="true">
        {marks(edges, scale).map(([place, text]) => <span style={{ left: `${(100 * place).toFixed(2)}%` }}>{text}</span>)}
      </div>
    </div>
  );
}

/** @param {Bins} bins @param {(i: number) => string} name */
function summary({ counts }, name) {
  const most = counts.indexOf(Math.max(...counts));
  return counts.length ? `${counts.length} bins, most in ${name(most)}` : 'empty';
}

const SUPERSCRIPTS = '⁰¹²³⁴⁵⁶⁷⁸⁹';
/** A power of ten. @param {number} exponent */
function power(exponent) {
  if (!Number.isInteger(exponent)) return number(10 ** exponent);
  if (exponent >= -2 && exponent <= 3) return String(10 ** exponent);
  return `10${exponent < 0 ? '⁻' : ''}${[...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[Number(digit)]).join('')}`;
}

/** Marks of the axis: their places between 0 and 1, and their texts. @param {number[]} edges @param {EdgeScale} scale @returns {[number, string][]} */
function marks(edges, scale) {
  if (edges.length < 2) return [];
  const [low, high] = [edges[0], edges[edges.length - 1]];
  if (scale !== 'logarithmic') {
    const found = ticks(low, high, 5).filter((value) => scale === 'linear' || Number.isInteger(value));
    return found.map((value) => [(value - low) / (high - low), scale === 'linear' ? minus(String(+value.toPrecision(6))) : power(value)]);
  }
  // The first edge may be 0, for what is too small: logarithms begin at the second.
  const positive = low > 0 ? 0 : 1;
  const n = edges.length - 1;
  const [start, end] = [Math.log10(edges[positive]), Math.log10(high)];
  /** @param {number} value */
  const place = (value) => (positive + ((Math.log10(value) - start) / (end - start || 1)) * (n - positive)) / n;
  const steps = end - start > 3 ? [1] : end - start > 1.2 ? [1, 3] : [1, 2, 5];
  /** @type {[number, string][]} */ const found = [];
  for (let exponent = Math.floor(start); exponent <= Math.ceil(end); exponent++)
    for (const step of steps) {
      const value = step * 10 ** exponent;
      if (Math.log10(value) >= start - 1e-9 && Math.log10(value) <= end + 1e-9) found.push([place(value), label(value)]);
    }
  return found.length > 1 ? found : [[0, number(low)], [1, number(high)]];
}

/** @param {number} value */
function label(value) {
  return value >= 1e-3 && value < 1e4 ? String(+value.toPrecision(3)) : power(Math.log10(value));
}
