// All units of a dictionary as points: similar directions lie close. The table of the same page says the same
// in words.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import { hideTip, showTip } from '../components/tip.js';
import { number, percentage } from '../format.js';

/** @typedef {{x: number[], y: number[], unit: number[], density?: number[], explained?: number}} Points */

const NEAR = 10; // pixels

/**
 * @param {{points: Points, onPick: (unit: number) => void, kind: string}} props
 */
export function DecoderMap({ points, onPick, kind }) {
  const canvas = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const [view, setView] = useState({ x: 0, y: 0, zoom: 1 });
  const [size, setSize] = useState({ width: 600, height: 420 });
  const drag = useRef(/** @type {{x: number, y: number, moved: boolean} | null} */ (null));
  const limits = useMemo(() => ({ x: extent(points.x), y: extent(points.y) }), [points]);
  // Without a store nobody knows how often they are active: all alike.
  const density = useMemo(() => points.density ?? points.unit.map(() => 0.01), [points]);
  const order = useMemo(() => points.unit.map((_, i) => i).sort((a, b) => density[a] - density[b]), [points]);
  const theme = document.documentElement.dataset.theme;

  useEffect(() => {
    const element = /** @type {HTMLCanvasElement} */ (canvas.current);
    const observer = new ResizeObserver(() => setSize({ width: element.clientWidth, height: element.clientHeight }));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  /** @param {number} i @returns {[number, number]} */
  function place(i) {
    const { width, height } = size;
    const fit = 0.92 * Math.min(width / limits.x.span, height / limits.y.span) * view.zoom;
    return [width / 2 + (points.x[i] - limits.x.middle) * fit + view.x, height / 2 - (points.y[i] - limits.y.middle) * fit + view.y];
  }

  useEffect(() => {
    const element = /** @type {HTMLCanvasElement} */ (canvas.current);
    const scale = devicePixelRatio || 1;
    element.width = Math.round(size.width * scale);
    element.height = Math.round(size.height * scale);
    const pen = /** @type {CanvasRenderingContext2D} */ (element.getContext('2d'));
    pen.scale(scale, scale);
    const style = getComputedStyle(element);
    const colours = { alive: style.color, dead: style.caretColor };
    const radius = Math.min(4, 1.8 * Math.sqrt(view.zoom));
    for (const i of order) {
      const [x, y] = place(i);
      if (x < -4 || y < -4 || x > size.width + 4 || y > size.height + 4) continue;
      const share = density[i];
      // Opacity from 1 in 100,000 tokens to 1 in 10.
      pen.globalAlpha = share > 0 ? Math.min(1, Math.max(0.25, (Math.log10(share) + 5) / 4)) : 0.5;
      pen.fillStyle = share > 0 ? colours.alive : colours.dead;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      pen.fill();
    }
  }, [points, size, view, theme]);

  /** The point under the pointer. @param {MouseEvent} event */
  function nearest(event) {
    const box = /** @type {HTMLCanvasElement} */ (canvas.current).getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = -1;
    let found = NEAR * NEAR;
    for (let i = 0; i < points.unit.length; i++) {
      const [x, y] = place(i);
      const distance = (x - px) ** 2 + (y - py) ** 2;
      if (distance < found) [best, found] = [i, distance];
    }
    return best;
  }
  /** @param {number} factor */
  const zoomBy = (factor) => setView((old) => {
    const zoom = Math.min(40, Math.max(1, old.zoom * factor));
    return zoom === 1 ? { x: 0, y: 0, zoom } : { x: (old.x * zoom) / old.zoom, y: (old.y * zoom) / old.zoom, zoom };
  });
  return (
    <div class="map">
      <canvas
        ref={canvas} role="img" aria-label={`${points.unit.length} ${kind}s by the first two principal components of their decoder rows; the table lists the same ones`}
        onPointerDown={(event) => { drag.current = { x: event.clientX, y: event.clientY, moved: false }; event.currentTarget.setPointerCapture(event.pointerId); }}
        onPointerMove={(event) => {
          const from = drag.current;
          if (from && (from.moved || Math.hypot(event.clientX - from.x, event.clientY - from.y) > 3)) {
            const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
            drag.current = { x: event.clientX, y: event.clientY, moved: true };
            setView((old) => ({ ...old, x: old.x + dx, y: old.y + dy }));
            return;
          }
          const i = nearest(event);
          const dot = /** @type {HTMLElement} */ (event.currentTarget.nextElementSibling);
          dot.hidden = i < 0;
          if (i < 0) return hideTip();
          const [x, y] = place(i);
          dot.style.left = `${x}px`;
          dot.style.top = `${y}px`;
          showTip(dot, [`${kind} ${points.unit[i]}`, density[i] > 0 ? `active on ${percentage(density[i])}` : 'never active']);
        }}
        onPointerUp={(event) => {
          const moved = drag.current?.moved;
          drag.current = null;
          const i = moved ? -1 : nearest(event);
          if (i >= 0) { hideTip(); onPick(points.unit[i]); }
        }}
        onPointerLeave={hideTip}
      />
      <span class="map-dot" hidden />
      <div class="map-tools row">
        <button type="button" aria-label="Zoom in" onClick={() => zoomBy(1.6)}>+</button>
        <button type="button" aria-label="Zoom out" disabled={view.zoom === 1} onClick={() => zoomBy(1 / 1.6)}>−</button>
        <button type="button" disabled={view.zoom === 1 && !view.x && !view.y} onClick={() => setView({ x: 0, y: 0, zoom: 1 })}>Reset</button>
        <span class="small soft">zoom {number(view.zoom)}; drag to move; darker points are active more often{points.explained ? `; the two axes hold ${percentage(points.explained)} of the variance` : ''}</span>
      </div>
    </div>
  );
}

/** @param {number[]} values */
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return { middle: (low + high) / 2, span: high - low || 1 };
}
