"""Other axes for the residual stream of a model: found on text, folded into its weights."""
