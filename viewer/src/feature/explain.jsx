// Explaining one unit by the server: by rules of its texts, scored beside what trivial competitors get.
import { useEffect, useState } from 'preact/hooks';
import { Problem, get, post, send, url } from '../api.js';
import { Failure } from '../components/states.jsx';
import { copy } from '../components/notice.js';
import { fixed } from '../format.js';

const LOOK = 400; // milliseconds between two questions

/**
 * @param {{id: string, unit: number, onDone: () => void}} props
 */
export function Explain({ id, unit, onDone }) {
  const [job, setJob] = useState(/** @type {any} */ (null));
  const [problem, setProblem] = useState(/** @type {Problem | null} */ (null));
  const running = job && (job.state === 'queued' || job.state === 'running');
  useEffect(() => {
    if (!running) return;
    const timer = setTimeout(async () => {
      try {
        const now = await get(url(['jobs', job.id]));
        setJob(now);
        if (now.state === 'done') onDone();
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        setProblem(error);
        setJob(null);
      }
    }, LOOK);
    return () => clearTimeout(timer);
  }, [job]);
  async function start() {
    setProblem(null);
    try {
      setJob(await post(url(['jobs', 'explain']), { dictionary: id, units: [unit] }));
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      setProblem(error);
    }
  }
  const item = job?.items?.[0];
  return (
    <div class="explain">
      {running ? (
        <p class="row" role="status"><span>Explaining and scoring …</span><button type="button" onClick={() => send('DELETE', url(['jobs', job.id]))}>Stop</button></p>
      ) : (
        <p class="row"><button type="button" onClick={start}>Explain by rules</button><span class="small soft">nothing leaves this machine</span></p>
      )}
      {problem && <Failure problem={problem} retry={start} />}
      {job?.state === 'failed' && <p role="alert">{job.error}</p>}
      {job?.state === 'done' && item && (
        <div role="status">
          {item.error && <p class="soft">{item.error}</p>}
          {item.scores.length > 0 && <Scores item={item} />}
          {item.scores.length > 0 && <button type="button" class="plain small" onClick={() => copy(job.python, 'Python')}>copy as Python</button>}
        </div>
      )}
    </div>
  );
}

/** @param {{item: any}} props */
function Scores({ item }) {
  return (
    <table class="list">
      <caption class="small soft">How well it predicts texts it was not made from</caption>
      <thead><tr><th scope="col">score</th><th scope="col" class="num">value</th><th scope="col" class="num">95 %</th><th scope="col" class="num">floor</th></tr></thead>
      <tbody>
        {item.scores.map((/** @type {any} */ one) => {
          const floor = one.floors.reduce((/** @type {any} */ a, /** @type {any} */ b) => (a && a.value >= b.value ? a : b), null);
          const above = floor && one.value !== null && one.value > floor.value;
          return (
            <tr key={one.name}>
              <th scope="row" title={one.metric}>{one.name}</th>
              <td class="num">{one.value === null ? '–' : fixed(one.value, 2)}</td>
              <td class="num nowrap">{one.interval ? `${fixed(one.interval[0], 2)} to ${fixed(one.interval[1], 2)}` : ''}</td>
              <td class={`num nowrap ${above ? '' : 'soft'}`}>{floor && <>{fixed(floor.value, 2)} <span class="small">{floor.name}</span></>}</td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}
