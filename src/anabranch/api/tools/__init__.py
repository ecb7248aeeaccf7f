"""Tools of chat completions: what is offered, what may be answered, and how it is read back.

:mod:`schemas` is the request's side, :mod:`plan` turns offered functions into constraints
(:mod:`grammar`), and :mod:`reader` turns the model's text into calls while it is generated. Earlier
calls and their results are part of the conversation (:mod:`anabranch.api.messages`). How a call is
written as text is the business of :mod:`anabranch.models.tools`.
"""
