import { useEffect, useRef, useState } from 'preact/hooks';

/**
 * A text while it is typed; it counts once nothing has been typed for a while.
 * @param {string} value what counts now @param {(text: string) => void} commit @param {number} pause milliseconds
 */
export function useDraft(value, commit, pause) {
  const [draft, setDraft] = useState(value);
  const shown = useRef(value); // what is typed before the first effects run stays
  useEffect(() => {
    if (shown.current !== value) setDraft(value);
    shown.current = value;
  }, [value]);
  useEffect(() => {
    if (draft === value) return;
    const timer = setTimeout(() => commit(draft), pause);
    return () => clearTimeout(timer);
  }, [draft]);
  return /** @type {const} */ ([draft, setDraft]);
}
