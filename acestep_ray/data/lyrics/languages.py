def language_code(text):
    return text.lower()
