"""The looks that lines and points of all plots have in common."""

__all__ = ["STYLES", "Style"]

Style = tuple[str, str, str]

# Colours are Okabe and Ito's, which colour-blind readers tell apart; lines and markers serve greyscale.
STYLES: tuple[Style, ...] = (
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#0072b2", "-.", "^"),
    ("#009e73", "-", "D"),
    ("#e69f00", "--", "v"),
    ("#cc79a7", ":", "X"),
    ("#56b4e9", "-.", "P"),
    ("#7f7f7f", ":", "*"),
)
