"""Tables and summaries of what runs measured."""
