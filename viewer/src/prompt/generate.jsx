// Two continuations side by side: the model as it is, and with the interventions.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Problem, stream, url } from '../api.js';
import { Icon } from '../components/icons.jsx';
import { Panel } from '../components/panel.jsx';
import { Failure } from '../components/states.jsx';
import { percentage, visible } from '../format.js';
import { useKeys } from '../keys.js';

/** @typedef {{id: number, text: string, prob: number | null}} Said */
/** @typedef {{baseline: Said[], changed: Said[], state: 'new' | 'running' | 'done' | 'stopped', diverged: number | null, python: string | null, problem: Problem | null}} Run */

/** @type {Run} */
const NOTHING = { baseline: [], changed: [], state: 'new', diverged: null, python: null, problem: null };

/**
 * @param {{text: string, sample: {tokens: number, temperature: number, top_p: number, seed: number}, most: number, interventions: any[],
 *   onSample: (sample: {tokens: number, temperature: number, top_p: number, seed: number}) => void}} props
 */
export function Generate({ text, sample, most, interventions, onSample }) {
  const [run, setRun] = useState(NOTHING);
  const abort = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => abort.current?.abort(), []);

  async function start() {
    abort.current?.abort();
    const mine = (abort.current = new AbortController());
    const body = { prompt: text, max_new: sample.tokens, temperature: sample.temperature, top_p: sample.top_p, seed: sample.seed, interventions, baseline: true };
    setRun({ ...NOTHING, state: 'running' });
    try {
      for await (const { event, data } of stream(url(['generate']), body, mine.signal)) {
        if (mine.signal.aborted) return; // what was already here when Stop was pressed
        if (event === 'token') setRun((old) => ({ ...old, [data.stream]: [...old[/** @type {'baseline' | 'changed'} */ (data.stream)], data] }));
        if (event === 'done') setRun((old) => ({ ...old, state: 'done', diverged: data.diverged_at ?? null, python: data.python ?? null }));
        if (event === 'error') throw new Problem(data, data.status ?? 500);
      }
    } catch (error) {
      if (mine.signal.aborted) return setRun((old) => (abort.current === mine ? { ...old, state: 'stopped' } : old));
      if (!(error instanceof Problem)) throw error;
      setRun((old) => ({ ...old, state: 'done', problem: error }));
    }
  }
  const running = run.state === 'running';
  function stop() {
    abort.current?.abort();
    setRun((old) => ({ ...old, state: 'stopped' }));
  }
  useKeys('Generation', running ? [{ keys: 'Escape', what: 'Stop', inText: true, run: stop }] : []);
  const two = interventions.length > 0;
  const parted = firstDifference(run.baseline, run.changed);
  return (
    <Panel
      id="generate" title="Generation" what={two ? 'what follows, without and with the interventions' : 'what follows; interventions give a second text beside it'} python={run.python} json={() => ({ baseline: run.baseline, changed: run.changed, diverged_at: run.diverged })}
    >
      <form class="row sampling" onSubmit={(event) => { event.preventDefault(); start(); }}>
        <Number_ label="Tokens" value={sample.tokens} min={1} max={most} step={1} onChange={(tokens) => onSample({ ...sample, tokens })} />
        <Number_ label="Temperature" value={sample.temperature} min={0} max={2} step={0.1} onChange={(temperature) => onSample({ ...sample, temperature })} />
        <Number_ label="Top p" value={sample.top_p} min={0.01} max={1} step={0.01} onChange={(top_p) => onSample({ ...sample, top_p })} />
        <Number_ label="Seed" value={sample.seed} min={0} max={2 ** 31} step={1} onChange={(seed) => onSample({ ...sample, seed })} />
        {running
          ? <button key="stop" type="button" class="primary stop" onClick={stop}><Icon name="stop" /> Stop</button>
          : <button key="start" type="submit" class="primary"><Icon name="play" /> Generate</button>}
        <span class="soft" role="status">{running ? 'Generating …' : run.state === 'stopped' ? 'Stopped' : run.state === 'done' && two ? (parted === null ? 'Both are the same' : `They part at new token ${parted}`) : ''}</span>
      </form>
      {run.problem && <Failure problem={run.problem} retry={start} />}
      {run.state !== 'new' && !run.problem && (
        <div class={`streams${two ? ' two' : ''}`}>
          <Stream title={two ? 'Unchanged' : 'Continuation'} name="baseline" prompt={text} said={run.baseline} parted={parted} />
          {two && <Stream title="With interventions" name="changed" prompt={text} said={run.changed} parted={parted} />}
        </div>
      )}
    </Panel>
  );
}

/** Where two texts part; null if one only goes on longer, or both are the same. @param {Said[]} a @param {Said[]} b */
export function firstDifference(a, b) {
  for (let i = 0; i < Math.min(a.length, b.length); i++) if (a[i].id !== b[i].id) return i;
  return null;
}

/** @param {{title: string, name: string, prompt: string, said: Said[], parted: number | null}} props */
function Stream({ title, name, prompt, said, parted }) {
  return (
    <section class="stream" data-stream={name} aria-label={title}>
      <h3>{title}</h3>
      <p class="text">
        <span class="soft">{prompt}</span>
        {said.map((one, i) => (
          <span key={i} data-id={one.id} class={`new${i === parted ? ' parted' : parted !== null && i > parted ? ' after' : ''}`} title={`${JSON.stringify(visible(one.text))}, ${percentage(one.prob)}`}>{one.text}</span>
        ))}
      </p>
    </section>
  );
}

/** @param {{label: string, value: number, min: number, max: number, step: number, onChange: (value: number) => void}} props */
function Number_({ label, value, min, max, step, onChange }) {
  return (
    <label>
      {label}{' '}
      <input type="number" value={value} min={min} max={max} step={step} onChange={(event) => { const found = event.currentTarget.valueAsNumber; if (Number.isFinite(found)) onChange(Math.min(max, Math.max(min, found))); }} />
    </label>
  );
}
