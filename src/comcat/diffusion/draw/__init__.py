"""Pictures from prompts, as files and on pages."""
