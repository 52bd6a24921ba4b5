// The logit lens: what the model would predict if it ended at each point of the stream.
import { useState } from 'preact/hooks';
import { post, url, useAsk } from '../api.js';
import { Panel } from '../components/panel.jsx';
import { Answer } from '../components/states.jsx';
import { fixed, percentage } from '../format.js';
import { tokenText } from '../vocabulary.js';
import { TokenWord } from './answer.jsx';

const POINT_TEXT = { mid: 'after attention', post: 'after the MLP', embedding: 'embedding' };

/** @param {{text: string, length: number | null, most: number}} props `length` in tokens */
export function Lens({ text, length, most }) {
  const [points, setPoints] = useState('post');
  const [at, setAt] = useState(/** @type {[number, number] | null} */ (null));
  const from = Math.max(0, (length ?? 0) - most);
  const positions = from > 0 ? Array.from({ length: most }, (_, i) => from + i) : null;
  const body = { text, points: points === 'post' ? ['post'] : ['mid', 'post'], k: 10, positions };
  const asked = useAsk(length === null ? null : JSON.stringify(body), (signal) => post(url(['lens']), body, { signal }));
  return (
    <Panel
      id="lens" title="Logit lens" what="what the model would say next if it ended here; darker is more probable" python={asked.data?.python} json={asked.data}
      actions={<select aria-label="Points" value={points} onChange={(event) => { setPoints(event.currentTarget.value); setAt(null); }}><option value="post">after each layer</option><option value="both">after attention and MLP</option></select>}
    >
      <Answer asked={asked} lines={8}>{(data) => <Grid data={data} at={at} setAt={setAt} />}</Answer>
    </Panel>
  );
}

/** @param {{data: any, at: [number, number] | null, setAt: (at: [number, number]) => void}} props */
function Grid({ data, at, setAt }) {
  const { positions, tokens } = data;
  const rows = data.points.map((/** @type {any} */ point, /** @type {number} */ i) => ({ ...point, i })).reverse();
  const [p, s] = at ?? [data.points.length - 1, positions.length - 1];
  const name = (/** @type {any} */ point) => (point.layer === null ? POINT_TEXT.embedding : `L${point.layer} ${POINT_TEXT[/** @type {'mid' | 'post'} */ (point.point)] ?? point.point}`);
  return (
    <div class="lens">
      <div class="scroll-x" tabIndex={0} role="region" aria-label="Predictions by layer and token">
        <table class="lens-table">
          <thead><tr><th scope="col"><span class="hidden">Point</span></th>{positions.map((/** @type {number} */ position) => <th scope="col">{tokenText(tokens[position], data)}</th>)}</tr></thead>
          <tbody>
            {rows.map((/** @type {any} */ point) => (
              <tr>
                <th scope="row">{name(point)}</th>
                {positions.map((/** @type {number} */ position, /** @type {number} */ j) => {
                  const prob = data.probs[point.i][j][0];
                  const word = tokenText(data.ids[point.i][j][0], data);
                  return (
                    <td class={`p${Math.min(9, Math.max(1, Math.ceil(9 * prob)))}${point.i === p && j === s ? ' chosen' : ''}`}>
                      <button type="button" aria-pressed={point.i === p && j === s} data-prob={prob} aria-label={`${name(point)}, token ${position}: ${word}, ${percentage(prob)}`} onClick={() => setAt([point.i, j])}>{word}</button>
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <aside aria-label="The likeliest tokens here">
        <h3>{name(data.points[p])}, token {positions[s]}</h3>
        <table>
          <tbody>{data.ids[p][s].map((/** @type {number} */ id, /** @type {number} */ i) => <tr><th scope="row"><TokenWord id={id} words={data} /></th><td class="num">{percentage(data.probs[p][s][i])}</td></tr>)}</tbody>
        </table>
        {data.kl && <p class="soft">{fixed(data.kl[p][s], 2)} nats from the final prediction</p>}
      </aside>
    </div>
  );
}
