"""The agent roles of the loop: what each is asked and answers (roles), and their LLM implementations (llm_roles)."""
