// Where heads look: all heads as small pictures, one of them large, and the same as tables.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import { send, url, useAsk } from '../api.js';
import { PairTable } from '../components/pair-table.jsx';
import { Panel } from '../components/panel.jsx';
import { Answer } from '../components/states.jsx';
import { fixed } from '../format.js';
import { href } from '../router.js';
import { tokenText } from '../vocabulary.js';

/**
 * Attention as it is sent: a header, then for each head the lower triangle in steps of 1/255 of `scale`.
 * @typedef {{ids: number[], vocab: Record<string, string>, heads: [number, number][], scale: number | number[], python: string, bytes: Uint8Array}} Patterns
 */

/** @param {ArrayBuffer} buffer @returns {Patterns} */
export function unpacked(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return { ...header, bytes: new Uint8Array(buffer, 4 + length) };
}

/** A number of one head. @param {Patterns} all @param {number} head @param {number} query @param {number} key */
export function weight(all, head, query, key) {
  const n = all.ids.length;
  const scale = Array.isArray(all.scale) ? all.scale[head] : all.scale;
  return (all.bytes[head * ((n * (n + 1)) / 2) + (query * (query + 1)) / 2 + key] / 255) * scale;
}

/** @param {any} body @param {AbortSignal} signal */
async function load(body, signal) {
  const reply = await send('POST', url(['attention']), { body, signal });
  return unpacked(await reply.arrayBuffer());
}

/** What a head does, in four numbers. @param {Patterns} all @param {number} head */
function summary(all, head) {
  const n = all.ids.length;
  let first = 0;
  let self = 0;
  let before = 0;
  let best = { value: -1, query: 0, key: 0 };
  for (let q = 0; q < n; q++) {
    first += weight(all, head, q, 0);
    self += weight(all, head, q, q);
    if (q > 0) before += weight(all, head, q, q - 1);
    for (let k = 1; k <= q; k++) {
      const value = weight(all, head, q, k);
      if (k < q && value > best.value) best = { value, query: q, key: k };
    }
  }
  return { first: first / n, self: self / n, before: before / Math.max(1, n - 1), best };
}

/**
 * @param {{text: string, nLayers: number, nHeads: number, limit: number, chosen: string, onChoose: (head: string) => void}} props
 */
export function Attention({ text, nLayers, nHeads, limit, chosen, onChoose }) {
  const [kind, setKind] = useState('pattern');
  const layers = Math.max(1, Math.min(nLayers, Math.floor(limit / nHeads)));
  const [from, setFrom] = useState(0);
  const heads = Array.from({ length: layers * nHeads }, (_, i) => [from + Math.floor(i / nHeads), i % nHeads]).filter(([l]) => l < nLayers);
  const body = { text, heads, kind };
  const asked = useAsk(JSON.stringify(body), (signal) => load(body, signal));
  return (
    <div class="split">
      <Panel
        id="heads" title="Attention heads" what="one picture a head: rows look, columns are looked at" python={asked.data?.python}
        json={() => asked.data && { heads: asked.data.heads, ids: asked.data.ids, values: asked.data.heads.map((/** @type {any} */ _, /** @type {number} */ i) => triangle(asked.data, i)) }}
        actions={
          <>
            <select aria-label="What is shown" value={kind} onChange={(event) => setKind(event.currentTarget.value)}><option value="pattern">attention</option><option value="write_norm">length of the write</option></select>
            {layers < nLayers && <select aria-label="Layers" value={String(from)} onChange={(event) => setFrom(Number(event.currentTarget.value))}>{Array.from({ length: Math.ceil(nLayers / layers) }, (_, i) => <option value={String(i * layers)}>layers {i * layers} to {Math.min(nLayers, (i + 1) * layers) - 1}</option>)}</select>}
          </>
        }
      >
        <Answer asked={asked} lines={8}>{(all) => <Grid all={all} chosen={chosen} onChoose={onChoose} />}</Answer>
      </Panel>
      {asked.data && <One all={asked.data} kind={kind} chosen={chosen} />}
    </div>
  );
}

/** @param {Patterns} all @param {number} head */
function triangle(all, head) {
  return all.ids.map((_, q) => Array.from({ length: q + 1 }, (_, k) => weight(all, head, q, k)));
}

/** @param {{all: Patterns, chosen: string, onChoose: (head: string) => void}} props */
function Grid({ all, chosen, onChoose }) {
  const notes = useMemo(() => all.heads.map((_, i) => summary(all, i)), [all]);
  const layers = [...new Set(all.heads.map(([layer]) => layer))];
  const word = (/** @type {number} */ i) => tokenText(all.ids[i], all);
  return (
    <>
      <div class="scroll-x" tabIndex={0} role="region" aria-label="Pictures of all heads">
        <div class="heads" role="group" aria-label="Heads">
          {layers.map((layer) => (
            <div class="heads-row" key={layer}>
              <span class="heads-layer">L{layer}</span>
              {all.heads.map(([l, h], i) => l === layer && (
                <button type="button" key={h} class="head" aria-pressed={chosen === `${l}.${h}`} title={`layer ${l}, head ${h}`} aria-label={`Layer ${l} head ${h}: ${word(notes[i].best.query)} looks at ${word(notes[i].best.key)}, ${fixed(Math.max(0, notes[i].best.value), 2)}`} onClick={() => onChoose(`${l}.${h}`)}>
                  <Picture all={all} head={i} />
                </button>
              ))}
            </div>
          ))}
        </div>
      </div>
      <details class="twin">
        <summary>The same as a table</summary>
        <div class="scroll-x" tabIndex={0} role="region" aria-label="Table of heads">
          <table>
            <thead><tr><th scope="col">Head</th><th scope="col" class="num">First token</th><th scope="col" class="num">Itself</th><th scope="col" class="num">Token before</th><th scope="col">Strongest pair, but for the first token</th></tr></thead>
            <tbody>
              {all.heads.map(([l, h], i) => (
                <tr><th scope="row"><a href={href(['h', l, h])}>L{l} head {h}</a></th><td class="num">{fixed(notes[i].first, 2)}</td><td class="num">{fixed(notes[i].self, 2)}</td><td class="num">{fixed(notes[i].before, 2)}</td><td>{notes[i].best.value < 0 ? '–' : <><code class="word">{word(notes[i].best.query)}</code> at <code class="word">{word(notes[i].best.key)}</code> <span class="soft">{fixed(notes[i].best.value, 2)}</span></>}</td></tr>
              ))}
            </tbody>
          </table>
        </div>
      </details>
    </>
  );
}

/** One head on canvas, one pixel a pair. The colour is the theme's; only its opacity says how much. @param {{all: Patterns, head: number}} props */
export function Picture({ all, head }) {
  const canvas = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const n = all.ids.length;
  useEffect(() => {
    const context = canvas.current?.getContext('2d');
    if (!context) return;
    const image = context.createImageData(n, n);
    const scale = Array.isArray(all.scale) ? all.scale[head] : all.scale;
    for (let q = 0; q < n; q++)
      for (let k = 0; k <= q; k++) {
        const at = 4 * (q * n + k);
        image.data[at] = 224;
        image.data[at + 1] = 112;
        image.data[at + 2] = 16;
        image.data[at + 3] = scale ? Math.min(255, (255 * weight(all, head, q, k)) / scale) : 0;
      }
    context.putImageData(image, 0, 0);
  }, [all, head]);
  return <canvas ref={canvas} width={n} height={n} class="picture" aria-hidden="true" />;
}

/** @param {{all: Patterns, kind: string, chosen: string}} props */
function One({ all, kind, chosen }) {
  const [layer, head] = chosen.split('.').map(Number);
  const found = all.heads.findIndex(([l, h]) => l === layer && h === head);
  const i = Math.max(0, found);
  const [l, h] = all.heads[i];
  return (
    <Panel id="one-head" title={`Layer ${l}, head ${h}`} what={kind === 'pattern' ? 'what share of its attention each token gives to earlier ones' : 'how long what it writes from each token is'} python={all.python} json={() => ({ layer: l, head: h, ids: all.ids, values: triangle(all, i) })} actions={<a class="button" href={href(['h', l, h])}>Open head</a>}>
      <HeadTable all={all} head={i} share={kind === 'pattern'} />
    </Panel>
  );
}

/** A head as a table. @param {{all: Patterns, head: number, share?: boolean}} props */
export function HeadTable({ all, head, share = true }) {
  const scale = Array.isArray(all.scale) ? all.scale[head] : all.scale;
  return <PairTable words={all.ids.map((id) => tokenText(id, all))} valueOf={(q, k) => weight(all, head, q, k)} scale={scale} share={share} />;
}
