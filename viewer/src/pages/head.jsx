// `#/h/{layer}/{head}`: one attention head: where it looks on a text, and what it writes from what it sees.
import { post, send, url, useAsk } from '../api.js';
import { useDraft } from '../components/draft.js';
import { Panel, Tool } from '../components/panel.jsx';
import { Answer, Empty, Loading } from '../components/states.jsx';
import { Unready } from '../components/unready.jsx';
import { fixed, percentage } from '../format.js';
import { Unit } from '../feature/side.jsx';
import { useKeys } from '../keys.js';
import { TokenWord } from '../prompt/answer.jsx';
import { HeadTable, unpacked } from '../prompt/attention.jsx';
import { go, href, whole } from '../router.js';
import { dictionaries, model, modelState } from '../state.js';
import { Astray } from './astray.jsx';

const FIRST_TEXT = 'The queen went into the forest, and when the king came home he looked for her, and the king was very sad.';
const PAUSE = 300; // milliseconds after the last letter

/** @param {{path: string[], query: Record<string, string>}} props */
export function HeadPage({ path, query }) {
  const all = model.value;
  const [layer, head] = [whole(path[0]), whole(path[1])];
  // Until the model has been loaded, the address is believed.
  const [layers, heads] = [all?.n_layers ?? layer + 1, all?.n_heads ?? head + 1];
  const text = query.text ?? FIRST_TEXT;
  /** @param {number} l @param {number} h */
  const show = (l, h) => go(href(['h', Math.min(Math.max(0, l), layers - 1), Math.min(Math.max(0, h), heads - 1)], { text: query.text }));
  useKeys('Head', [
    { keys: 'ArrowRight', what: 'Next head', run: () => show(layer, head + 1) },
    { keys: 'ArrowLeft', what: 'Head before', run: () => show(layer, head - 1) },
    { keys: 'ArrowUp', what: 'Next layer', run: () => show(layer + 1, head) },
    { keys: 'ArrowDown', what: 'Layer before', run: () => show(layer - 1, head) },
    { keys: 't', what: 'Edit the text', run: () => document.getElementById('head-text')?.focus() },
  ]);
  if (!all) return <div class="page"><Loading lines={8} /></div>;
  if (!(layer < layers && head < heads))
    return (
      <div class="page head-page">
        <Astray title={`There is no head ${path[1] ?? 0} in layer ${path[0]}`} why={all.n_layers ? 'These are the heads of the model:' : 'An address names a layer and a head, such as 0 and 2.'}>
          {all.n_layers && <HeadList layers={all.n_layers} heads={all.n_heads} />}
        </Astray>
      </div>
    );
  const stores = dictionaries.value.filter((one) => one.kind === 'head' && one.layer === layer);
  return (
    <div class="page head-page">
      <header class="row">
        <h1>Layer {layer}, head {head}</h1>
        <span class="push row">
          <label>Layer <select value={String(layer)} onChange={(event) => show(Number(event.currentTarget.value), head)}>{Array.from({ length: layers }, (_, i) => <option value={String(i)}>{i}</option>)}</select></label>
          <label>Head <select value={String(head)} onChange={(event) => show(layer, Number(event.currentTarget.value))}>{Array.from({ length: heads }, (_, i) => <option value={String(i)}>{i}</option>)}</select></label>
          <Tool icon="left" label="Head before" keys="←" disabled={head === 0} onClick={() => show(layer, head - 1)} />
          <Tool icon="right" label="Next head" keys="→" disabled={head === heads - 1} onClick={() => show(layer, head + 1)} />
        </span>
      </header>
      <Text text={text} onText={(next) => go(href(['h', layer, head], { text: next }), { replace: true })} />
      {modelState.value !== 'ready' ? <Unready lines={10} /> : text === '' ? <Empty title="No text" /> : <Views key={`${layer}.${head}`} layer={layer} head={head} text={text} prompt={href(['p'], { a: text, tab: 'attention', head: `${layer}.${head}` })} />}
      {modelState.value === 'ready' && <Latents key={`latents ${layer}.${head}`} layer={layer} head={head} query={query} />}
      {stores.length > 0 && <p class="soft">Examples of a corpus: {stores.map((one) => <a href={href(['f', one.id, head])}>{one.name}</a>)}</p>}
    </div>
  );
}

/** All heads, as links. @param {{layers: number, heads: number}} props */
export function HeadList({ layers, heads }) {
  return (
    <div class="scroll-x" tabIndex={0} role="region" aria-label="Heads by layer">
      <table class="head-list"><tbody>{Array.from({ length: layers }, (_, l) => (
        <tr key={l}><th scope="row" class="soft">layer {l}</th>{Array.from({ length: heads }, (_, h) => <td><a href={href(['h', l, h])} aria-label={`Layer ${l} head ${h}`}>{h}</a></td>)}</tr>
      ))}</tbody></table>
    </div>
  );
}

/** @param {{text: string, onText: (text: string) => void}} props */
function Text({ text, onText }) {
  const [draft, setDraft] = useDraft(text, onText, PAUSE);
  return <textarea id="head-text" aria-label="Text that the head reads" rows={2} spellcheck={false} maxLength={4000} value={draft} onInput={(event) => setDraft(event.currentTarget.value)} />;
}

/** @param {{layer: number, head: number, text: string, prompt: string}} props */
function Views({ layer, head, text, prompt }) {
  const body = { text, heads: [[layer, head]], kind: 'pattern' };
  const pattern = useAsk(JSON.stringify(body), async (signal) => unpacked(await (await send('POST', url(['attention']), { body, signal })).arrayBuffer()));
  const more = { text, layer, head };
  const asked = useAsk(JSON.stringify(more), (signal) => post(url(['head']), more, { signal }));
  return (
    <>
      <div class="split wide-left">
        <Panel id="pattern" title="Where it looks" what="rows look, columns are looked at; per cent of the attention of each token" python={pattern.data?.python} json={asked.data} actions={<a class="button" href={prompt}>All heads</a>}>
          <Answer asked={pattern} lines={10}>{(all) => <HeadTable all={all} head={0} />}</Answer>
        </Panel>
        <Panel id="head-pairs" title="Strongest pairs" what="where it writes most, on this text" json={asked.data?.pairs} python={asked.data?.python}>
          <Answer asked={asked} lines={8}>{(data) => <Pairs data={data} />}</Answer>
        </Panel>
      </div>
      <Panel id="ov" title="What it writes" what="tokens that it promotes when it looks at a token: the token's embedding through values, output and unembedding" json={asked.data?.ov} python={asked.data?.python}>
        <Answer asked={asked} lines={6}>{(data) => <Writes data={data} />}</Answer>
      </Panel>
    </>
  );
}

/** @param {{data: any}} props */
function Pairs({ data }) {
  if (!data.pairs.length) return <Empty title="It writes nothing here" />;
  return (
    <table class="pair-list">
      <thead><tr><th scope="col">Looks</th><th scope="col">at</th><th scope="col" class="num">attention</th><th scope="col" class="num" title="the length of what it writes from there">write</th></tr></thead>
      <tbody>{data.pairs.slice(0, 15).map((/** @type {any} */ pair) => (
        <tr>
          <th scope="row"><TokenWord id={data.ids[pair.position]} words={data} /><sub class="soft">{pair.position}</sub></th><td><TokenWord id={data.ids[pair.attended]} words={data} /><sub class="soft">{pair.attended}</sub></td>
          <td class="num">{percentage(pair.pattern)}</td><td class="num" data-value={pair.write_norm}>{fixed(pair.write_norm, 2)}</td>
        </tr>
      ))}</tbody>
    </table>
  );
}

/** Latents of earlier layers that look at one another through the head's weights. @param {{layer: number, head: number, query: Record<string, string>}} props */
function Latents({ layer, head, query }) {
  const before = dictionaries.value.filter((one) => one.kind === 'latent' && one.has_autoencoder && one.layer !== null && one.layer < layer);
  const ids = before.map((one) => one.id);
  const ends = /** @type {const} */ (['queries', 'keys']).map((end) => ({ end, id: ids.includes(query[end]) ? query[end] : ids.at(-1) }));
  const body = { layer, head, queries: ends[0].id, keys: ends[1].id, k: 20 };
  const asked = useAsk(ids.length ? JSON.stringify(body) : null, (signal) => post(url(['head', 'latents']), body, { signal }));
  return (
    <Panel id="head-latents" title="Latents that look at one another" what="score of one unit of activation of each, from the weights of queries and keys" json={asked.data?.pairs} python={asked.data?.python}>
      {!ids.length ? <Empty title="No dictionary of an earlier layer is at hand" /> : (
        <>
          <p class="row">{ends.map(({ end, id }) => (
            <label>{end === 'keys' ? 'are looked at' : 'look'} <select value={id} onChange={(event) => go(href(['h', layer, head], { ...query, [end]: event.currentTarget.value }), { replace: true })}>{before.map((one) => <option value={one.id}>{one.name}</option>)}</select></label>
          ))}</p>
          <Answer asked={asked} lines={8}>{(data) => (
            <>
              <table class="pair-list">
                <thead><tr><th scope="col">Latent</th><th scope="col">looks at</th><th scope="col" class="num">score</th></tr></thead>
                <tbody>{data.pairs.map((/** @type {any} */ pair) => (
                  <tr>{[pair.query, pair.key].map((one) => <td><Unit link={href(['f', one.dictionary, one.unit])} unit={one.unit} label={one.label} /></td>)}<td class="num" data-value={pair.score}>{fixed(pair.score, 4)}</td></tr>
                ))}</tbody>
              </table>
              <p class="small soft">{data.note}</p>
            </>
          )}</Answer>
        </>
      )}
    </Panel>
  );
}

/** For each token of the text: what the head writes when it looks at this token alone. @param {{data: any}} props */
function Writes({ data }) {
  return (
    <div class="scroll-x" tabIndex={0} role="region" aria-label="What it writes for each token">
      <table class="writes">
        <thead><tr><th scope="col">When it looks at</th><th scope="col">it promotes</th><th scope="col">and demotes</th></tr></thead>
        <tbody>{data.ov.map((/** @type {any} */ one) => (
          <tr><th scope="row"><TokenWord id={one.id} words={data} /></th>{[one.promotes, one.demotes].map((list) => <td>{list.slice(0, 7).map((/** @type {any} */ item) => <span class="wrote" title={fixed(item.value, 2)}><TokenWord id={item.id} words={data} /></span>)}</td>)}</tr>
        ))}</tbody>
      </table>
    </div>
  );
}
