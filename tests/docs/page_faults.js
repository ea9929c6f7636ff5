// Faults of the page in this window. What scrolls in a box of its own does not stick out.
smallest => {
    const faults = [], width = document.documentElement.clientWidth, article = document.querySelector("article");
    const name = e => `<${e.tagName.toLowerCase()} class="${e.className}"> ${e.textContent.trim().slice(0, 60)}`;
    const seen = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
    const boxed = e => e !== document.body && (getComputedStyle(e).overflowX !== "visible" || boxed(e.parentElement));
    if (document.scrollingElement.scrollWidth > width) faults.push(`is ${document.scrollingElement.scrollWidth} px wide`);
    for (const e of article.querySelectorAll("*"))
        if (seen(e) && e.getBoundingClientRect().right > width + 1 && !boxed(e)) faults.push(`sticks out: ${name(e)}`);
    for (const e of document.images) if (!e.naturalWidth) faults.push(`picture: ${e.src}`);
    let level = 0;
    for (const e of article.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
        if (+e.tagName[1] > level + 1) faults.push(`heading skips a level: ${name(e)}`);
        level = +e.tagName[1];
    }
    const words = document.createTreeWalker(article, NodeFilter.SHOW_TEXT), small = [];
    while (words.nextNode()) {
        const e = words.currentNode.parentElement;
        if (words.currentNode.data.trim() && seen(e) && parseFloat(getComputedStyle(e).fontSize) < smallest) small.push(e);
    }
    if (small.length) faults.push(`${small.length} times text below ${smallest} px: ${name(small[0])}`);
    return faults;
}
