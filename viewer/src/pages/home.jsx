// `#/`: straight to a feature, because a page with something on it says more than a welcome.
import { useEffect } from 'preact/hooks';
import { url, useGet } from '../api.js';
import { Empty, Loading } from '../components/states.jsx';
import { go, href } from '../router.js';
import { dictionaries, model } from '../state.js';

export function HomePage() {
  const all = dictionaries.value;
  // The last layer's latents have the most to say; of these, one that is active seldom and strongly.
  const first = all.filter((one) => one.kind === 'latent').at(-1) ?? all[0];
  const asked = useGet(first ? url(['dictionaries', first.id, 'features'], { sort: 'max', order: 'desc', alive: true, density_max: 0.01, limit: 1 }) : null);
  const unit = asked.data?.items[0]?.unit ?? (asked.data || asked.error ? 0 : null);
  useEffect(() => {
    if (first && unit !== null) go(href(['f', first.id, unit]), { replace: true });
  }, [first, unit]);
  if (model.value && !first)
    return (
      <div class="page">
        <Empty title="There are no dictionaries here">
          <p>Collate the examples of an autoencoder or of a model's neurons, then serve the folder:</p>
          <pre>neuron-explainer collate … --out out{'\n'}neuron-explainer serve --store out</pre>
        </Empty>
      </div>
    );
  return <div class="page"><Loading lines={6} /></div>;
}
