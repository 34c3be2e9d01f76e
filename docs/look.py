"""Look at every page of the site as people do: `python docs/look.py` after `python docs/build.py`.

Headless Chromium opens each page at the width of a desk and of a phone, light and dark. What is wrong is printed, and
the exit status is 1: a link or a picture that leads nowhere, an error in the console, a page or a table that is wider
than the window and cannot be scrolled by itself. `--pictures DIR PAGE ...` stores a picture of each of these pages.

Needs `pip install playwright` and a Chromium: the system's, or that of `playwright install chromium`.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import Page, sync_playwright

SITE = Path(__file__).parents[1] / "build" / "site"
WIDTHS = {"desk": 1280, "phone": 390}
THEMES = ("light", "dark")

# What of a page is wider than the window, and has no bar of its own to scroll by.
OVERFLOWING = """() => {
  const found = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width + 1) found.push(`page ${document.documentElement.scrollWidth}`);
  for (const e of document.querySelectorAll('article table, article img, article pre')) {
    if (e.getBoundingClientRect().right <= width + 1) continue;
    let p = e, scrolls = false;
    while (p && p.tagName !== 'ARTICLE') {
      const o = getComputedStyle(p).overflowX;
      scrolls = scrolls || o === 'auto' || o === 'scroll' || o === 'hidden';
      p = p.parentElement;
    }
    if (!scrolls) found.push(`${e.tagName} ${e.textContent.slice(0, 40)}`);
  }
  return found;
}"""
BROKEN = """elsewhere => [...document.images]
  .filter(i => !i.src.startsWith(elsewhere) && !(i.complete && i.naturalWidth)).map(i => i.src)"""
BADGES = "https://colab.research.google.com/"  # no other host is asked; a badge of this one is taken to be there
LINKS = "() => [...document.querySelectorAll('a[href]')].map(a => a.href)"
ANCHORS = "() => [...document.querySelectorAll('[id]')].map(e => e.id)"


def serve() -> tuple[http.server.ThreadingHTTPServer, str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def look(page: Page, base: str, name: str, first: bool) -> tuple[list[str], set[str], set[str]]:
    """What is wrong with a page; and, at its first time, its links to this site and its anchors."""
    page.goto(f"{base}/{name}", wait_until="load")
    wrong = [f"wider than the window: {what}" for what in page.evaluate(OVERFLOWING)]
    wrong += [f"no picture: {src}" for src in page.evaluate(BROKEN, BADGES)]
    if not first:
        return wrong, set(), set()
    links = {link for link in page.evaluate(LINKS) if link.startswith(base)}
    return wrong, links, set(page.evaluate(ANCHORS))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of PAGES")
    parser.add_argument("pages", nargs="*", help="such as index.html; none is every page")
    options = parser.parse_args(arguments)
    every = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
    names = options.pages or every
    server, base = serve()
    wrong: list[str] = []
    errors: list[str] = []
    anchors: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        for size, width in WIDTHS.items():
            for theme in THEMES:
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
                context.add_init_script(f"localStorage.setItem('theme', '{theme}')")
                context.route(lambda url: not url.startswith(base), lambda route: route.abort())  # no other host
                page = context.new_page()
                page.on("pageerror", lambda error: errors.append(f"{error}"))
                for name in names:
                    found, to, ids = look(page, base, name, name not in anchors)
                    wrong += [f"{name}, {size}, {theme}: {what}" for what in found]
                    if name not in anchors:
                        anchors[name], links[name] = ids, to
                    if options.pictures:
                        options.pictures.mkdir(parents=True, exist_ok=True)
                        stem = name.removesuffix(".html").replace("/", "-")
                        page.screenshot(path=options.pictures / f"{stem}-{size}-{theme}.png")
                context.close()
        browser.close()
    server.shutdown()
    for name, targets in links.items():
        for link in targets:
            parts = urlsplit(link)
            path = unquote(parts.path).lstrip("/") or "index.html"
            if not (SITE / path).exists():
                wrong.append(f"{name}: leads nowhere: {path}")
            elif parts.fragment and path in anchors and unquote(parts.fragment) not in anchors[path]:
                wrong.append(f"{name}: no such anchor: {path}#{parts.fragment}")
    wrong += sorted({*errors})
    print("\n".join(wrong) or f"{len(names)} pages, at {len(WIDTHS)} widths, light and dark: nothing wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
