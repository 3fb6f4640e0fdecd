"""Texts of different kinds, to look at a pair of tokenizers without having data at hand."""

#: Name to text.
SAMPLES = {
    "English": (
        "The photographer couldn't believe how quickly the fog had lifted; unbelievably, nobody else had noticed.\n"
    ),
    "code": (
        "def mean(values: list[float]) -> float:\n"
        "    total = sum(values)\n"
        "    return total / max(len(values), 1)  # never divides by 0\n"
    ),
    "numbers": (
        "In 2024 there were 1,234,567 of them: 37 * 48 = 1776, and 0.1 + 0.2 = 0.30000000000000004.\n"
        "$\\int_0^1 x^2\\,dx = \\frac{1}{3}$\n"
    ),
    "German": "Die Straßenbahn fährt über die Brücke; größere Züge müssten draußen warten.\n",
    "French": "L'été dernier, où étions-nous ? À l'hôtel, près de la forêt, avec un garçon très étonné.\n",
    "Russian": "Завтра утром поезд отправится к морю, а вечером вернётся обратно.\n",
    "Chinese": "今天天气很好,我们去公园看樱花,然后喝一杯热茶。\n",
    "emoji": "Great job 🎉🚀 – see you at 18:30 👩‍💻 ❤️ ¯\\_(ツ)_/¯\n",
}
