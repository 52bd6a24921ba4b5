// Units by tokens: one row a unit, one column a token of the prompt.
import { useMemo, useState } from 'preact/hooks';
import { Empty } from '../components/states.jsx';
import { Scale, level, levelClass } from '../components/tokens.jsx';
import { fixed } from '../format.js';
import { href } from '../router.js';
import { tokenText } from '../vocabulary.js';
import { MEASURES, MEASURE_TEXT, matrixOf, pageOf } from './nodes.js';

const PAGE = 40;

/** @param {{data: any, two: boolean, onPosition: (position: number) => void}} props */
export function Matrix({ data, two, onPosition }) {
  const [measure, setMeasure] = useState(/** @type {import('./nodes.js').Measure} */ ('act_grad'));
  const [side, setSide] = useState(/** @type {import('./nodes.js').Side} */ ('A'));
  const [shown, setShown] = useState(PAGE);
  const chosen = two ? side : 'A';
  const { ids } = data.prompts[0];
  const columns = useMemo(() => columnsOf(data, two), [data, two]);
  const units = useMemo(() => matrixOf(data.nodes, data.values, measure, chosen, ids.length), [data, measure, chosen]);
  const scale = units.length ? Math.max(...units[0].values.map((x) => Math.abs(x ?? 0))) : 0;
  if (!data.nodes.length) return <Empty title="No nodes" />;
  return (
    <>
      <p class="row">
        <label>Number <select value={measure} onChange={(event) => setMeasure(/** @type {any} */ (event.currentTarget.value))}>{MEASURES.map((name) => <option value={name}>{MEASURE_TEXT[name].name}</option>)}</select></label>
        {two && <label>of <select value={side} onChange={(event) => setSide(/** @type {any} */ (event.currentTarget.value))}><option value="A">A</option><option value="B">B</option><option value="diff">A − B</option></select></label>}
        <Scale scale={scale} signed />
      </p>
      <div class="scroll-x" tabIndex={0} role="region" aria-label="Units by tokens">
        <table class="matrix">
          <thead>
            <tr>
              <th scope="col">Unit</th>
              {columns.map(({ a, b }) => (
                <th scope="col" data-a={a ?? ''} data-b={b ?? ''} class={a === null || (two && b === null) ? 'alone' : ''}>
                  {a === null ? <span class="soft" title="only in B">{tokenText(data.prompts[1].ids[/** @type {number} */ (b)], data)}</span> : (
                    <button type="button" class="plain" title={`token ${a}${two && b === null ? ', only in A' : ''}: show its nodes`} onClick={() => onPosition(a)}>{tokenText(ids[a], data)}{two && b !== null && data.prompts[1].ids[b] !== ids[a] && <small> / {tokenText(data.prompts[1].ids[b], data)}</small>}</button>
                  )}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {units.slice(0, shown).map((unit) => {
              const page = pageOf(unit.node);
              return (
                <tr>
                  <th scope="row">{page ? <a href={href(page)}>{unit.name}</a> : unit.name}</th>
                  {columns.map(({ a }) => {
                    const value = a === null ? null : unit.values[a];
                    return <td class={`num${value === null ? ' none' : levelClass(level(value, scale))}`} data-value={value ?? ''}>{value === null ? '' : fixed(value, 2)}</td>;
                  })}
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {units.length > shown && <p class="row"><button type="button" onClick={() => setShown(shown + PAGE)}>Show {Math.min(PAGE, units.length - shown)} more</button><span class="soft">of {units.length} units</span></p>}
    </>
  );
}

/**
 * The columns: tokens of A, and between them those that only B has.
 * @param {any} data @param {boolean} two @returns {{a: number | null, b: number | null}[]}
 */
export function columnsOf(data, two) {
  const own = data.prompts[0].ids.map((/** @type {number} */ _, /** @type {number} */ i) => ({ a: i, b: null }));
  if (!two || !data.aligned) return own;
  const some = (/** @type {number | null | undefined} */ x) => (x === null || x === undefined || x < 0 ? null : x);
  return data.aligned.map((/** @type {any[]} */ [a, b]) => ({ a: some(a), b: some(b) }));
}
