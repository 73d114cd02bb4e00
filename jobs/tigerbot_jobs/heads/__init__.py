"""The two heads: should the text go on diverging (p_div), and how far has it left the facts (p_dev)."""
