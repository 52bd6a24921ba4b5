import { model, modelState } from '../state.js';
import { Empty, Loading } from './states.jsx';

/** What stands in place of what the model would say, as long as it cannot be asked. @param {{lines?: number}} props */
export function Unready({ lines = 0 }) {
  const state = modelState.value;
  if (state === 'loading') return <Empty title="The model is being loaded"><p>What needs it comes by itself.</p>{lines > 0 && <Loading lines={lines} label="The model is being loaded" />}</Empty>;
  return <Empty title={state === 'failed' ? 'The model could not be loaded' : 'No model runs here'}><p>{model.value?.error ?? 'The stores can be read. Start the server with a model to compute.'}</p></Empty>;
}
