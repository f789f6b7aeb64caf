"""``kpmctl support-bundle``: what somebody who helps needs to know, in one file.

``parts`` says what one part of it is; ``daemon`` and ``machine`` have those that there are,
``redact`` takes out of them what is nobody's business, ``archive`` makes the file, and ``collect``
joins all that.
"""
