// The table of nodes: what each unit at each token does to the target.
import { Fragment } from 'preact';
import { useState } from 'preact/hooks';
import { Tool } from '../components/panel.jsx';
import { Empty } from '../components/states.jsx';
import { level, levelClass } from '../components/tokens.jsx';
import { fixed, number } from '../format.js';
import { href } from '../router.js';
import { MEASURES, MEASURE_TEXT, cell, nextSort, nodeName, pageOf, tokenAt, whyNotChanged, whyNotTraced } from './nodes.js';

/** @typedef {import('./nodes.js').Row} Row */
/** @typedef {import('./nodes.js').Side} Side */
/** @typedef {import('./nodes.js').Sort} Sort */

const PAGE = 60;
const ORDER_TEXT = { size: 'largest size first', down: 'largest first', up: 'smallest first' };

/**
 * @typedef {object} TableProps
 * @property {any} data the reply of /debug
 * @property {Row[]} rows those shown, in order
 * @property {Sort} sort
 * @property {string} open key of the row whose detail is shown
 * @property {string} current key of the row that keys act on
 * @property {boolean} two whether there is a second side
 * @property {[string, string]} sides what the two are called
 * @property {(sort: Sort) => void} onSort
 * @property {(row: Row) => void} onOpen
 * @property {(row: Row) => void} onCurrent
 * @property {(row: Row) => void} onAblate
 * @property {(row: Row) => void} onTrace
 * @property {(row: Row) => any} detail
 */

/** @param {TableProps} props */
export function NodeTable({ data, rows, sort, open, current, two, sides, onSort, onOpen, onCurrent, onAblate, onTrace, detail }) {
  const [shown, setShown] = useState(PAGE);
  const columns = /** @type {Side[]} */ (two ? ['A', 'B', 'diff'] : ['A']);
  const pairs = data.nodes.some((/** @type {any} */ node) => node.attended !== null && node.attended !== undefined);
  const ids = data.prompts[0].ids;
  const scales = Object.fromEntries(MEASURES.map((measure) => [measure, largest(data, measure, columns)]));
  const titles = { A: sides[0], B: sides[1], diff: sides[0] === 'A' ? 'A − B' : 'change' };

  return (
    <>
      <div class="scroll-x" tabIndex={0} role="region" aria-label="Table of nodes">
        <table class={`nodes${two ? ' sideways' : ''}`} data-sort={`${sort.measure}.${sort.side}.${sort.order}`}>
          <thead>
            {two && (
              <tr class="groups">
                <td colSpan={pairs ? 3 : 2} />
                {MEASURES.map((measure) => <th scope="colgroup" colSpan={3} title={MEASURE_TEXT[measure].what}>{MEASURE_TEXT[measure].name}</th>)}
                <td />
              </tr>
            )}
            <tr>
              <th scope="col">Node</th>
              <th scope="col">Token</th>
              {pairs && <th scope="col">Looks at</th>}
              {MEASURES.map((measure) => columns.map((side) => {
                const chosen = sort.measure === measure && sort.side === side;
                const what = two ? `${MEASURE_TEXT[measure].name}, ${titles[side]}` : MEASURE_TEXT[measure].name;
                return (
                  <th scope="col" class="num" aria-sort={chosen ? (sort.order === 'up' ? 'ascending' : 'descending') : undefined}>
                    <button type="button" class={`sort${chosen ? ' chosen' : ''}`} title={`${MEASURE_TEXT[measure].what}${chosen ? `; ${ORDER_TEXT[sort.order]}` : ''}`} aria-label={`Sort by ${what}`} onClick={() => onSort(nextSort(sort, measure, side))}>
                      {two ? titles[side] : MEASURE_TEXT[measure].name}<span aria-hidden="true" class="arrow">{chosen ? { size: '↕', down: '↓', up: '↑' }[sort.order] : ''}</span>
                    </button>
                  </th>
                );
              }))}
              <th scope="col"><span class="hidden">What to do</span></th>
            </tr>
          </thead>
          <tbody>
            {rows.slice(0, shown).map((row) => {
              const { node } = row;
              const page = pageOf(node);
              const name = nodeName(node);
              const full = `${name} at ${node.position ?? `${node.position_b} of B`}`;
              const opened = row.key === open;
              return (
                <Fragment key={row.key}>
                  <tr data-key={row.key} class={`${row.key === current ? 'current' : ''}${opened ? ' opened' : ''}`} aria-current={row.key === current ? 'true' : undefined} onClick={(event) => { onCurrent(row); if (event.target instanceof Element && !event.target.closest('a, button')) onOpen(row); }}>
                    <th scope="row">
                      {page ? <a href={href(page)}>{name}</a> : <span>{name}</span>}
                      {node.label && <span class="label">{node.label}</span>}
                    </th>
                    <td>{place(data, node, two && data.prompts.length === 2)}</td>
                    {pairs && <td>{node.attended !== null && node.attended !== undefined && <Place ids={ids} vocab={data.vocab} position={node.attended} />}</td>}
                    {MEASURES.map((measure) => columns.map((side) => {
                      const value = cell(data.values, measure, row.index, side);
                      return <td class={`num${value === null ? ' none' : measure === 'activation' ? '' : levelClass(level(value, scales[measure]))}`} data-measure={measure} data-side={side} data-value={value ?? ''}>{measure === 'activation' ? number(value) : fixed(value)}</td>;
                    }))}
                    <td class="do">
                      <Tool icon="ban" label={`Set ${full} to 0`} keys="a" disabled={whyNotChanged(node) !== null} onClick={() => onAblate(row)} />
                      <Tool icon="left" label={`Trace ${full}`} keys="t" disabled={whyNotTraced(node) !== null} onClick={() => onTrace(row)} />
                      <Tool icon={opened ? 'up' : 'down'} label={`${opened ? 'Close' : 'Open'} ${full}`} keys="Enter" pressed={opened} onClick={() => onOpen(row)} />
                    </td>
                  </tr>
                  {opened && <tr class="detail"><td colSpan={3 + (pairs ? 1 : 0) + MEASURES.length * columns.length}>{detail(row)}</td></tr>}
                </Fragment>
              );
            })}
          </tbody>
        </table>
      </div>
      {rows.length === 0 && <Empty title={data.nodes.length ? 'No node fits the filter' : 'No nodes'}>{data.nodes.length === 0 && <p>Nothing before this node contributes to it: the trace ends here.</p>}</Empty>}
      {rows.length > shown && <p class="row"><button type="button" onClick={() => setShown(shown + PAGE)}>Show {Math.min(PAGE, rows.length - shown)} more</button><span class="soft">of {rows.length}</span></p>}
    </>
  );
}

/** The token of a node; with two prompts also that of the second where it is another. @param {any} data @param {import('./nodes.js').Node} node @param {boolean} two */
function place(data, node, two) {
  const other = two && node.position_b !== null && node.position_b !== undefined ? node.position_b : null;
  const [a, b] = data.prompts;
  const same = other !== null && node.position !== null && a.ids[node.position] === b.ids[other];
  return (
    <>
      {node.position !== null ? <Place ids={a.ids} vocab={data.vocab} position={node.position} /> : <span class="soft">–</span>}
      {other !== null && (same ? node.position !== other && <sub class="soft">/{other}</sub> : <span class="soft"> / <Place ids={b.ids} vocab={data.vocab} position={other} /></span>)}
    </>
  );
}

/** @param {any} data @param {import('./nodes.js').Measure} measure @param {Side[]} sides */
function largest(data, measure, sides) {
  let found = 0;
  for (let i = 0; i < data.nodes.length; i++) for (const side of sides) found = Math.max(found, Math.abs(cell(data.values, measure, i, side) ?? 0));
  return found;
}

/** @param {{ids: number[], vocab: Record<string, string>, position: number}} props */
export function Place({ ids, vocab, position }) {
  return <span class="place"><code class="word">{tokenAt(ids, vocab, position)}</code><sub>{position}</sub></span>;
}
