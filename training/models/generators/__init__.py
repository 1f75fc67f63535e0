"""Language models that read passages and write answers."""
