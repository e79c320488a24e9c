"""Write a planner: the first block, the own block and the one before it, for any decoder."""

import torch

from deepseek.models import Decoder
from deepseek.models.presets import preset
from deepseek.ops.attention import BlockTable


class SinkAndLocal:
    """Every query block sees block 0, itself, and the block before: linear in the length."""

    block_size = 32

    def plan(self, layer, queries, kv, layout):
        """Return the same table for every layer, row and head."""
        count = BlockTable.num_query_blocks(layout, self.block_size)
        own = layout.query_start[0] // self.block_size + torch.arange(count)
        listed = torch.stack((own, (own - 1).clamp(min=0), torch.zeros_like(own)), dim=-1)
        # blocks 0 and 1 have fewer than three different blocks to list
        table = BlockTable(
            indices=listed.int()[None, None],
            counts=(own + 1).clamp(max=3).int()[None, None],
            block_size=self.block_size,
        )
        table.check(layout, queries.shape[1], num_kv_heads=1)
        return table


model = Decoder(preset("7b").sized("tiny")).eval()
short, long = torch.randint(0, 512, (1, 96)), torch.randint(0, 512, (1, 400))
with torch.no_grad():
    dense_short, dense_long = model(short).logits, model(long).logits
    model.planner = SinkAndLocal()
    # 96 tokens are three blocks, so the table lists all of them: equal to dense attention.
    print(f"96 tokens: {float((model(short).logits - dense_short).abs().max()):.1e}")
    print(f"400 tokens: {float((model(long).logits - dense_long).abs().max()):.1e}")
    torch.testing.assert_close(model(short).logits, dense_short, rtol=1e-4, atol=1e-5)
