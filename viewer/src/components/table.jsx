// A long table of which only the rows in view are in the page. All rows are equally high.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Icon } from './icons.jsx';

const SPARE = 8; // rows above and below those in view

/**
 * @typedef {object} Column
 * @property {string} id
 * @property {string} title
 * @property {string} width of CSS grids, such as `96px` or `minmax(0, 2fr)`
 * @property {boolean} [num] set to the right
 * @property {boolean} [sorts] whether its head sorts the table
 * @property {(row: any) => any} cell
 */

/**
 * @typedef {object} TableProps
 * @property {string} label
 * @property {Column[]} columns
 * @property {number} total how many rows there are
 * @property {(i: number) => any} row a row, or undefined while it is not there yet
 * @property {(from: number, to: number) => void} [onView] which rows are in view
 * @property {{by: string, order: 'asc' | 'desc'}} [sort]
 * @property {(id: string) => void} [onSort]
 * @property {number} [rowHeight]
 * @property {string} [height] of CSS
 * @property {boolean} [stale]
 * @property {string} [resetKey] the table goes back to its top when this changes
 */

/** @param {TableProps} props */
export function VirtualTable({ label, columns, total, row, onView, sort, onSort, rowHeight = 38, height = '62vh', stale = false, resetKey }) {
  const box = useRef(/** @type {HTMLDivElement | null} */ (null));
  const [view, setView] = useState({ from: 0, to: 30 });
  function look() {
    const element = box.current;
    if (!element) return;
    const from = Math.max(0, Math.floor(element.scrollTop / rowHeight) - SPARE);
    const to = Math.min(total, Math.ceil((element.scrollTop + element.clientHeight) / rowHeight) + SPARE);
    setView((old) => (old.from === from && old.to === to ? old : { from, to }));
  }
  useEffect(look, [total]);
  useEffect(() => {
    if (box.current) box.current.scrollTop = 0;
    look();
  }, [resetKey]);
  useEffect(() => {
    if (total) onView?.(view.from, Math.min(view.to, total));
  }, [view, total, resetKey]);
  const template = { gridTemplateColumns: columns.map((column) => column.width).join(' ') };
  const rows = [];
  for (let i = view.from; i < Math.min(view.to, total); i++) {
    const data = row(i);
    rows.push(
      <div class="vrow" role="row" aria-rowindex={i + 2} key={i} style={{ ...template, top: `${i * rowHeight}px`, height: `${rowHeight}px` }}>
        {columns.map((column, c) => (
          <div role={c ? 'cell' : 'rowheader'} class={column.num ? 'num' : undefined}>{data === undefined ? <i class={`bone w${(i + c) % 4}`} /> : column.cell(data)}</div>
        ))}
      </div>,
    );
  }
  return (
    <div class={`vtable${stale ? ' stale' : ''}`} role="table" aria-label={label} aria-rowcount={total + 1} aria-busy={stale}>
      <div role="rowgroup" class="vhead">
        <div class="vrow" role="row" aria-rowindex={1} style={template}>
          {columns.map((column) => {
            const at = sort?.by === column.id ? sort.order : undefined;
            return (
              <div role="columnheader" class={column.num ? 'num' : undefined} aria-sort={at ? (at === 'asc' ? 'ascending' : 'descending') : undefined}>
                {column.sorts && onSort ? (
                  <button type="button" class="plain" onClick={() => onSort(column.id)}>
                    {column.title}<span class={`arrow${at ? '' : ' none'}`}><Icon name={at === 'asc' ? 'up' : 'down'} size={12} /></span>
                  </button>
                ) : (
                  column.title
                )}
              </div>
            );
          })}
        </div>
      </div>
      <div class="vbody" role="rowgroup" ref={box} tabIndex={0} onScroll={look} style={{ height: `min(${height}, ${Math.max(total, 1) * rowHeight}px)` }} aria-label={`Rows of ${label}`}>
        <div class="vall" role="presentation" style={{ height: `${total * rowHeight}px` }}>{rows}</div>
      </div>
    </div>
  );
}
