from chela.config.words import command, configured, guarded, help_text, no_more, opened, options_text, plain, read_words  # noqa: F401

main = configured
