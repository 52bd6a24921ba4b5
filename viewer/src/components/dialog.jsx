import { useEffect, useRef } from 'preact/hooks';
import { Tool } from './panel.jsx';

/**
 * A window over the page; the browser keeps the focus in it and closes it with Escape.
 * @param {{title: string, onClose: () => void, class?: string, bare?: boolean, children: any}} props
 */
export function Dialog({ title, onClose, class: name = '', bare = false, children }) {
  const box = useRef(/** @type {HTMLDialogElement | null} */ (null));
  useEffect(() => {
    const before = document.activeElement;
    box.current?.showModal();
    return () => {
      if (before instanceof HTMLElement) before.focus({ preventScroll: true });
    };
  }, []);
  return (
    <dialog
      ref={box}
      class={`dialog ${name}`}
      aria-label={title}
      onClose={onClose}
      onClick={(event) => event.target === box.current && onClose()}
    >
      <div class="dialog-inside">
        {!bare && (
          <header class="panel-head">
            <h2>{title}</h2>
            <Tool icon="close" label="Close" onClick={onClose} />
          </header>
        )}
        {children}
      </div>
    </dialog>
  );
}
