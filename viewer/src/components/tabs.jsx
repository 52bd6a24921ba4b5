import { useRef } from 'preact/hooks';

/**
 * Tabs; arrow keys move between them.
 * @param {{label: string, tabs: {id: string, title: string, count?: number, keys?: string}[], at: string, onChange: (id: string) => void, panel: string}} props
 * `panel` is the id of the element that they change
 */
export function Tabs({ label, tabs, at, onChange, panel }) {
  const box = useRef(/** @type {HTMLDivElement | null} */ (null));
  /** @param {KeyboardEvent} event */
  function onKeyDown(event) {
    const step = event.key === 'ArrowLeft' ? -1 : event.key === 'ArrowRight' ? 1 : 0;
    if (!step) return;
    const next = (tabs.findIndex((tab) => tab.id === at) + step + tabs.length) % tabs.length;
    onChange(tabs[next].id);
    /** @type {HTMLElement} */ (box.current?.children[next]).focus();
    event.preventDefault();
    event.stopPropagation();
  }
  return (
    <div class="tabs" role="tablist" aria-label={label} ref={box} onKeyDown={onKeyDown}>
      {tabs.map((tab) => (
        <button
          type="button" role="tab" id={`${panel}-${tab.id}`} aria-selected={tab.id === at} aria-controls={panel} tabIndex={tab.id === at ? 0 : -1}
          onClick={() => onChange(tab.id)}
        >
          {tab.title}{tab.count !== undefined && <span class="count">{tab.count}</span>}{tab.keys && <kbd>{tab.keys}</kbd>}
        </button>
      ))}
    </div>
  );
}
