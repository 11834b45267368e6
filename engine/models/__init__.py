"""The two players of AR2 and how they read text: retriever (Eq. 1), ranker (Eq. 4), loading, input templates."""
