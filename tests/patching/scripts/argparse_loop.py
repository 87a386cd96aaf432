#!/usr/bin/env python
import argparse


def get_args():
    parser = argparse.ArgumentParser(description='batch_size: 16 by default')
    group = parser.add_argument_group("training")
    group.add_argument('--lr', type=float, default=1e-4)
    group.add_argument(
        '-b', '--batch-size',
        type=int,
        default=16,
        help="per GPU (default: %(default)s)",
    )
    group.add_argument('--val-batch-size', default=64, type=int)
    group.add_argument("--grad-accum-steps", type=int, default=2, help='accumulate')
    return parser.parse_args()


def main():
    args = get_args()
    world_batch = args.batch_size * args.grad_accum_steps
    loader = DataLoader(train_set, batch_size=args.batch_size)
    for step, batch in enumerate(loader):
        bs, seq_len = batch['input_ids'].shape
        loss = model(**batch).loss / args.grad_accum_steps
        loss.backward()


if __name__ == '__main__':
    main()
