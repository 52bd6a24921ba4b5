import { useEffect, useState } from 'preact/hooks';
import { Dialog } from './dialog.jsx';

/** Short messages, and texts that the browser does not let us copy. */
export function Notices() {
  const [notice, setNotice] = useState(/** @type {{text: string, tone: string} | null} */ (null));
  const [text, setText] = useState(/** @type {{text: string, what: string} | null} */ (null));
  useEffect(() => {
    let timer = 0;
    /** @param {any} event */
    const onNotice = (event) => {
      setNotice(event.detail);
      clearTimeout(timer);
      timer = setTimeout(() => setNotice(null), 3500);
    };
    /** @param {any} event */
    const onCopy = (event) => setText(event.detail);
    addEventListener('nx-notice', onNotice);
    addEventListener('nx-copy', onCopy);
    return () => {
      removeEventListener('nx-notice', onNotice);
      removeEventListener('nx-copy', onCopy);
    };
  }, []);
  return (
    <>
      <div class="notices" role="status" aria-live="polite">
        {notice && <p class={`notice ${notice.tone}`}>{notice.text}</p>}
      </div>
      {text && (
        <Dialog title={`${text.what}: copy by hand`} onClose={() => setText(null)}>
          <p class="soft">The browser lets pages copy only over https or on this machine.</p>
          <textarea class="by-hand" aria-label={text.what} readOnly rows={14} onFocus={(event) => event.currentTarget.select()}>{text.text}</textarea>
        </Dialog>
      )}
    </>
  );
}

