// `#/m/{layer}/{place}`: the model as a diagram of its places, and what is known of each.
import { useState } from 'preact/hooks';
import { post, url, useAsk } from '../api.js';
import { Figures } from '../components/figures.jsx';
import { Panel } from '../components/panel.jsx';
import { Answer, Empty, Loading } from '../components/states.jsx';
import { Unready } from '../components/unready.jsx';
import { count, fixed, percentage } from '../format.js';
import { useKeys } from '../keys.js';
import { go, href, whole } from '../router.js';
import { dictionaries, model } from '../state.js';
import { pieces } from '../vocabulary.js';
import { Astray } from './astray.jsx';
import { HeadList } from './head.jsx';

/** @typedef {{path: string, shape: string[], layers: boolean, units: string | null, group: string}} Site */

/** Where each place stands in the picture: column and row. The stream runs down on the left. */
const PLACES = /** @type {Record<string, [number, number]>} */ ({
  'resid.post_emb': [0, 0],
  'resid.torso.ln_attn.post_mean_subtraction': [1, 1], 'resid.torso.ln_attn.scale': [2, 1], 'resid.torso.ln_attn.post_scale': [3, 1], 'resid.torso.post_ln_attn': [4, 1],
  'attn.q': [5, 1], 'attn.k': [5, 2], 'attn.v': [5, 3],
  'attn.qk_logits': [4, 2], 'attn.qk_softmax_denominator': [3, 2], 'attn.qk_probs': [2, 2],
  'attn.v_out': [2, 3], 'resid.torso.delta_attn': [1, 3], 'resid.torso.post_attn': [0, 3],
  'resid.torso.ln_mlp.post_mean_subtraction': [1, 4], 'resid.torso.ln_mlp.scale': [2, 4], 'resid.torso.ln_mlp.post_scale': [3, 4], 'resid.torso.post_ln_mlp': [4, 4],
  'mlp.pre_act': [5, 4], 'mlp.post_act': [5, 5], 'resid.torso.delta_mlp': [1, 5], 'resid.torso.post_mlp': [0, 5],
  'resid.ln_f.post_mean_subtraction': [1, 6], 'resid.ln_f.scale': [2, 6], 'resid.ln_f.post_scale': [3, 6], 'resid.post_ln_f': [4, 6],
  logits: [5, 6],
});
const ARROWS = [
  ['resid.torso.ln_attn.post_mean_subtraction', 'resid.torso.ln_attn.scale'], ['resid.torso.ln_attn.scale', 'resid.torso.ln_attn.post_scale'], ['resid.torso.ln_attn.post_scale', 'resid.torso.post_ln_attn'], ['resid.torso.post_ln_attn', 'attn.q'],
  ['attn.q', 'attn.qk_logits'], ['attn.k', 'attn.qk_logits'], ['attn.qk_logits', 'attn.qk_softmax_denominator'], ['attn.qk_softmax_denominator', 'attn.qk_probs'],
  ['attn.v', 'attn.v_out'], ['attn.qk_probs', 'attn.v_out'], ['attn.v_out', 'resid.torso.delta_attn'], ['resid.torso.delta_attn', 'resid.torso.post_attn'],
  ['resid.torso.ln_mlp.post_mean_subtraction', 'resid.torso.ln_mlp.scale'], ['resid.torso.ln_mlp.scale', 'resid.torso.ln_mlp.post_scale'], ['resid.torso.ln_mlp.post_scale', 'resid.torso.post_ln_mlp'], ['resid.torso.post_ln_mlp', 'mlp.pre_act'],
  ['mlp.pre_act', 'mlp.post_act'], ['mlp.post_act', 'resid.torso.delta_mlp'], ['resid.torso.delta_mlp', 'resid.torso.post_mlp'],
  ['resid.ln_f.post_mean_subtraction', 'resid.ln_f.scale'], ['resid.ln_f.scale', 'resid.ln_f.post_scale'], ['resid.ln_f.post_scale', 'resid.post_ln_f'], ['resid.post_ln_f', 'logits'],
];
const [WIDTH, HEIGHT, COLUMN, LINE] = [114, 32, 138, 60];
const LAST = 5; // column
const WORDS = /** @type {Record<string, string>} */ ({
  b: 'batch', s: 'tokens', q: 'tokens that look', k: 'tokens looked at', h: 'heads', d: 'channels of the stream', d_head: 'channels of a head', f: 'neurons', v: 'vocabulary', 1: 'one',
});

/** @param {{path: string[]}} props */
export function ModelPage({ path }) {
  const all = model.value;
  const sites = /** @type {Site[]} */ (all?.sites ?? []);
  const layer = whole(path[0]);
  // Until the model has been loaded, the address is believed.
  const layers = all?.n_layers ?? 1 + Math.max(layer, ...dictionaries.value.map((one) => one.layer ?? -1));
  const chosen = sites.find((site) => site.path === path[1]) ?? sites.find((site) => site.path === 'mlp.post_act') ?? sites[0];
  /** @param {number} by */
  const step = (by) => go(href(['m', Math.min(Math.max(0, layer + by), layers - 1), ...(chosen ? [chosen.path] : [])]), { replace: true });
  useKeys('Model', [
    { keys: 'ArrowUp', what: 'Next layer', run: () => step(1) },
    { keys: 'ArrowDown', what: 'Layer before', run: () => step(-1) },
  ]);
  if (!all) return <div class="page"><Loading lines={8} /></div>;
  if (!(layer < layers)) return <div class="page"><Astray title={`The model has no layer ${path[0]}`} why="Its layers:" places={Array.from({ length: layers || 1 }, (_, i) => [`Layer ${i}`, href(['m', i])])} /></div>;
  if (sites.length && path[1] !== undefined && chosen?.path !== path[1])
    return <div class="page"><Astray title={`The model has no place called ${path[1]}`} why="Its places:" places={sites.map((site) => [site.path, href(['m', layer, site.path])])} /></div>;
  return (
    <div class="page model-page">
      <h1>{all.name ?? 'No model'}</h1>
      <Facts all={all} />
      <div class="split wide-left">
        <Panel
          id="places" title="Places" what="every place of a pass where hooks can look and change; choose one" json={sites} python={modelScript(all.python, 'result = list(model.paths)')}
          actions={layers > 1 && <label class="layer-choice">Layer <select value={String(layer)} onChange={(event) => go(href(['m', event.currentTarget.value, ...(chosen ? [chosen.path] : [])]), { replace: true })}>{Array.from({ length: layers }, (_, i) => <option value={String(i)}>{i}</option>)}</select></label>}
        >
          {sites.length ? <Diagram sites={sites} layer={layer} chosen={chosen?.path} /> : <Unready lines={10} />}
        </Panel>
        {chosen && <Place site={chosen} layer={layer} all={all} />}
      </div>
      <div class="split">
        <Grid layers={layers} />
        <div class="stack">
          {all.n_heads > 0 && (
            <Panel id="head-list" title="Attention heads" what="where each looks, and what it writes" json={all.heads}>
              <HeadList layers={layers} heads={all.n_heads} />
            </Panel>
          )}
          <Tokenizer ready={all.state === 'ready'} />
          <Panel id="limits" title="This server" what="what one request may ask for" json={{ limits: all.limits, capabilities: all.capabilities }}>
            <dl class="limits">{Object.entries(all.limits ?? {}).map(([name, value]) => <div><dt>{name.replaceAll('_', ' ')}</dt><dd class="num">{count(/** @type {number} */ (value))}</dd></div>)}</dl>
            <p class="soft">{(all.capabilities ?? []).join(', ')}{all.read_only ? '; labels cannot be changed' : ''}</p>
          </Panel>
        </div>
      </div>
    </div>
  );
}

/** @param {{all: any}} props */
function Facts({ all }) {
  const facts = /** @type {[string, any][]} */ ([['parameters', all.parameters], ['layers', all.n_layers], ['heads', all.n_heads], ['channels of the stream', all.d_model], ['neurons a layer', all.d_ff], ['context', all.n_ctx], ['vocabulary', all.n_vocab]]).filter(([, value]) => value !== null && value !== undefined);
  return facts.length > 0 && <Figures items={[...facts.map(([name, value]) => /** @type {[string, string]} */ ([name, count(value)])), ...(all.device ? [/** @type {[string, string, string]} */ (['runs on', all.device, all.dtype])] : [])]} />;
}

/** @param {{sites: Site[], layer: number, chosen: string | undefined}} props */
function Diagram({ sites, layer, chosen }) {
  const known = new Map(sites.map((site) => [site.path, site]));
  const drawn = Object.entries(PLACES).filter(([path]) => known.has(path));
  const others = sites.filter((site) => !PLACES[site.path]);
  const rows = Math.max(...drawn.map(([, [, row]]) => row)) + 1;
  const here = new Set(dictionaries.value.filter((one) => one.layer === layer || one.layer === null).map((one) => one.site));
  /** @param {string} path @returns {[number, number]} */
  const middle = (path) => [8 + PLACES[path][0] * COLUMN + WIDTH / 2, 8 + PLACES[path][1] * LINE + HEIGHT / 2];
  const x = 8 + WIDTH / 2;
  return (
    <>
      <div class="scroll-x" tabIndex={0} role="region" aria-label={`Places of layer ${layer}`}>
        <svg class="diagram" viewBox={`0 0 ${16 + LAST * COLUMN + WIDTH} ${rows * LINE}`} width={16 + LAST * COLUMN + WIDTH} height={rows * LINE} role="group" aria-label={`Diagram of layer ${layer}`}>
          <defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8Z" /></marker></defs>
          <line class="stream-line" x1={x} y1={8 + HEIGHT / 2} x2={x} y2={8 + 6 * LINE + HEIGHT / 2} />
          {[1, 4, 6].map((row) => <path class="edge" d={`M${x} ${8 + row * LINE + HEIGHT / 2}H${8 + COLUMN - 2}`} marker-end="url(#tip)" />)}
          {known.has('attn.k') && known.has('resid.torso.post_ln_attn') && [2, 3].map((row) => <path class="edge" d={`M${8 + 4.94 * COLUMN - 8} ${8 + LINE + HEIGHT / 2}V${8 + row * LINE + HEIGHT / 2}H${8 + LAST * COLUMN - 2}`} marker-end="url(#tip)" />)}
          {ARROWS.filter((pair) => pair.every((path) => known.has(path))).map(([from, to]) => {
            const [[ax, ay], [bx, by]] = [middle(from), middle(to)];
            const flat = ay === by;
            const side = Math.sign(bx - ax);
            const d = flat ? `M${ax + (side * WIDTH) / 2} ${ay}H${bx - side * (WIDTH / 2 + 1)}` : ax === bx ? `M${ax} ${ay + HEIGHT / 2}V${by - HEIGHT / 2 - 1}` : `M${ax} ${ay + HEIGHT / 2}L${bx + (side < 0 ? WIDTH / 3 : -WIDTH / 3)} ${by - Math.sign(by - ay) * (HEIGHT / 2 + 1)}`;
            return <path class="edge" d={d} marker-end="url(#tip)" />;
          })}
          <text class="lane" x={16 + LAST * COLUMN + WIDTH - 8} y={LINE - 10} text-anchor="end">attention</text>
          <text class="lane" x={16 + LAST * COLUMN + WIDTH - 8} y={4 * LINE - 1} text-anchor="end">MLP</text>
          {drawn.map(([path]) => {
            const [cx, cy] = middle(path);
            const site = /** @type {Site} */ (known.get(path));
            const name = short(path);
            return (
              <a key={path} href={href(['m', layer, path])} class={`place-box${path === chosen ? ' chosen' : ''}${PLACES[path][0] === 0 ? ' on-stream' : ''}`} aria-current={path === chosen ? 'true' : undefined} aria-label={`${path}, ${site.shape.join(' by ')}${here.has(path) ? ', with a dictionary' : ''}`} onClick={(event) => { event.preventDefault(); go(href(['m', layer, path]), { replace: true }); }}>
                <rect x={cx - WIDTH / 2} y={cy - HEIGHT / 2} width={WIDTH} height={HEIGHT} rx="6" />
                <text x={cx} y={cy + 4} text-anchor="middle">{name}</text>
                {here.has(path) && <circle cx={cx + WIDTH / 2 - 9} cy={cy - HEIGHT / 2 + 9} r="4" />}
              </a>
            );
          })}
        </svg>
      </div>
      {others.length > 0 && <ul class="row others">{others.map((site) => <li><a href={href(['m', layer, site.path])} aria-current={site.path === chosen ? 'true' : undefined}>{site.path}</a></li>)}</ul>}
      <p class="soft small"><svg width="10" height="10" class="legend" aria-hidden="true"><circle cx="5" cy="5" r="4" /></svg> a dictionary is here. The stream runs down on the left; the lanes read from it and write to it.</p>
    </>
  );
}

/** @param {string} path */
function short(path) {
  return path.replace(/^resid\.(torso\.)?/, '').replace(/^(attn|mlp)\./, '').replace('qk_softmax_denominator', 'qk_denominator').replace('post_mean_subtraction', 'centred').replace('post_scale', 'out').replace('qk_denominator', 'qk_denom');
}

/** Python that opens the model, and goes on. @param {string} open the script that opens the model @param {string} rest */
function modelScript(open, rest) {
  return `${open.trimEnd().replace(/^result = model$\n?/m, '').replace(/^result = /m, 'model = ').trimEnd()}\n${rest}\n`;
}

/** Python that captures a place on a text. @param {string} open @param {string} place */
function captureScript(open, place) {
  return modelScript(open, `place = ${JSON.stringify(place)}\nresult = model.capture("Once upon a time", place)[place]`);
}

/** @param {{site: Site, layer: number, all: any}} props */
function Place({ site, layer, all }) {
  const place = site.layers ? `${layer}/${site.path}` : site.path;
  const found = dictionaries.value.filter((one) => one.location === place || (one.site === site.path && (one.layer === layer || one.layer === null)));
  const sizes = /** @type {Record<string, number | null>} */ ({ h: all.n_heads, d: all.d_model, f: all.d_ff, v: all.n_vocab, d_head: all.n_heads ? all.d_model / all.n_heads : null });
  const script = captureScript(all.python, place);
  return (
    <Panel id="place" title={place} what={site.group} json={site} python={script}>
      <dl class="shape">
        {site.shape.map((name) => <div><dt><code>{name}</code> {WORDS[name]}</dt><dd class="num">{sizes[name] ? count(sizes[name]) : ''}</dd></div>)}
      </dl>
      <h3>Look at it</h3>
      <pre tabIndex={0} aria-label="Python">{script}</pre>
      <h3>Dictionaries here</h3>
      {found.length === 0 ? <p class="soft">None. <code>neuron-explainer collate</code> writes one.</p> : (
        <ul class="here">{found.map((one) => <li><a href={href(['d', one.id])}>{one.name}</a> <span class="soft">{count(one.n)} {one.kind}s, {percentage(one.n_alive / Math.max(1, one.n))} alive{one.metrics?.fvu !== undefined ? `, FVU ${fixed(one.metrics.fvu, 2)}` : ''}</span></li>)}</ul>
      )}
    </Panel>
  );
}

/** Dictionaries by layer and place. @param {{layers: number}} props */
function Grid({ layers }) {
  const all = dictionaries.value;
  const sites = [...new Set(all.map((one) => `${one.site} ${one.kind}`))];
  return (
    <Panel id="dictionary-grid" title="Dictionaries" what="by layer and place; the share of units that are alive" json={all} python={model.value?.stores_python}>
      {all.length === 0 ? <Empty title="No dictionaries" /> : (
        <div class="scroll-x" tabIndex={0} role="region" aria-label="Table of dictionaries">
          <table class="grid">
            <thead><tr><th scope="col">Layer</th>{sites.map((site) => <th scope="col">{site.split(' ')[0].replace('resid.torso.', '')} <span class="soft">{site.split(' ')[1]}s</span></th>)}</tr></thead>
            <tbody>{Array.from({ length: layers }, (_, i) => layers - 1 - i).map((layer) => (
              <tr key={layer}>
                <th scope="row">{layer}</th>
                {sites.map((site) => <td>{all.filter((one) => one.layer === layer && `${one.site} ${one.kind}` === site).map((one) => {
                  const alive = one.n_alive / Math.max(1, one.n);
                  return <a class="cell" href={href(['d', one.id])} title={one.name} aria-label={`${one.name}: ${percentage(alive)} alive of ${one.n}`}><b class="tabular">{percentage(alive)}</b> <small>{one.metrics?.fvu !== undefined ? `FVU ${fixed(one.metrics.fvu, 2)}` : `of ${count(one.n)}`}</small></a>;
                })}</td>)}
              </tr>
            ))}</tbody>
          </table>
        </div>
      )}
    </Panel>
  );
}

/** @param {{ready: boolean}} props */
function Tokenizer({ ready }) {
  const [text, setText] = useState('Once upon a time');
  const asked = useAsk(ready && text ? `tokens ${text}` : null, (signal) => post(url(['tokenize']), { text }, { signal }), { delay: 150 });
  return (
    <Panel id="tokenizer" title="Tokenizer" what="a text as the model reads it" json={asked.data} python={asked.data?.python}>
      <textarea aria-label="Text for the tokenizer" rows={2} value={text} maxLength={4000} spellcheck={false} onInput={(event) => setText(event.currentTarget.value)} />
      {!ready ? <p class="soft">Waits for the model.</p> : text === '' ? <p class="soft">No tokens.</p> : (
        <Answer asked={asked} lines={1}>{(data) => (
          <ol class="token-row">{pieces(data.ids, data).map((piece) => <li title={`token ${data.ids.slice(piece.from, piece.to).join(', ')}`}><code>{piece.text.replace(/^ /, '␣')}</code><small class="soft">{data.ids.slice(piece.from, piece.to).join(' ')}</small></li>)}</ol>
        )}</Answer>
      )}
    </Panel>
  );
}
