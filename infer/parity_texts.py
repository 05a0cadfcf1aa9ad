"""What both sides read: varied real text, because random ids and short prompts hide errors."""

TEXTS = (
    """The tide tables for the harbour had been kept by hand since 1871, in ledgers bound in green cloth, and nobody had
ever thought to ask whether they were right. Margaret Oyelaran asked. She had come to the observatory to study storms,
not tides, but the storms arrived on the back of the tides, and a surge that meets high water at 3:40 in the morning
drowns streets that the same surge at noon would leave dry. So she copied eleven thousand numbers into a spreadsheet,
plotted the differences, and found a line that was almost straight. "Almost," she told the harbourmaster, "is where
the interesting things live." He replied that""",
    """长江是亚洲第一长河，全长约六千三百公里，发源于青藏高原的唐古拉山脉，流经十一个省、自治区和直辖市，最后在上海注入东海。
古时候，人们沿江建城，靠江吃江：春天捕鱼，夏天防汛，秋天运粮，冬天修船。如今，三峡大坝横跨江面，既能发电，也能调节洪水，但它对鱼类洄游
和泥沙沉积的影响仍在研究之中。有人问：“如果没有大坝，武汉的夏天会是什么样子？”要回答这个问题，我们首先需要""",
    '''import heapq
from collections import defaultdict


def shortest_paths(edges: list[tuple[str, str, float]], source: str) -> dict[str, float]:
    """Dijkstra's algorithm. Raises ValueError when an edge is negative."""
    graph: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for start, end, cost in edges:
        if cost < 0:
            raise ValueError(f"edge {start!r} -> {end!r} has negative cost {cost}")
        graph[start].append((end, cost))
    distance = {source: 0.0}
    queue = [(0.0, source)]
    while queue:
        here, node = heapq.heappop(queue)
        if here > distance.get(node, float("inf")):
            continue
''',
    """Theorem. There are infinitely many primes congruent to 3 modulo 4. Proof. Suppose that $p_1, \\dots, p_k$ are
all of them, and put $N = 4 p_1 p_2 \\cdots p_k - 1$. Then $N \\equiv 3 \\pmod 4$, so $N$ is odd, and since a product of
numbers that are $1$ modulo $4$ is again $1$ modulo $4$, at least one prime factor $q$ of $N$
satisfies $q \\equiv 3 \\pmod 4$.
For $k = 3$ with $p = 3, 7, 11$ one gets $N = 4 \\cdot 231 - 1 = 923 = 13 \\cdot 71$. Hence""",
    """{"order": 20418, "placed": "2024-02-29T23:59:58+09:00", "customer": {"name": "Zoë Müller-Ångström",
 "loyal": true}, "lines": [{"sku": "A-17/β", "quantity": 3, "price": 12.50},
 {"sku": "茶-0042", "quantity": 1, "price": 1999.00}, {"sku": "☕️🫖", "quantity": 12, "price": 0.05}],
 "notes": "Привет! Laissez le colis chez le voisin, s'il vous plaît;
 ありがとうございます。", "total":""",
    """use std::collections::HashMap;

/// Counts words, ignoring case; words are what `char::is_alphanumeric` separates.
pub fn word_counts(text: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
        *counts.entry(word.to_lowercase()).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are""",
)


def folded(text: str, vocab_size: int) -> list[int]:
    """Ids for a model without a tokenizer: neighbouring bytes of the text, hashed into its vocabulary."""
    data = text.encode()
    return [(31 * a + b) % vocab_size for a, b in zip(data, data[1:], strict=False)]
