import gc, sys
from torch.utils.data import DataLoader


class CFG:
    debug = False
    apex=True
    model="microsoft/deberta-v3-base"
    # ---- optimisation
    encoder_lr=2e-5
    batch_size=8 # per step
    valid_batch_size=32
    gradient_accumulation_steps=1
    max_len=512
    class paths:
        train = "../input/train.csv"
        batch_size_file = 'bs.txt'


if CFG.debug:
    CFG.epochs = 2
    CFG.batch_size = 2


def train_fn(fold, train_loader, model, criterion, optimizer, epoch, scheduler, device):
    for step, (inputs, labels) in enumerate(train_loader):
        batch_size = labels.size(0)
        loss = criterion(model(inputs), labels)
        if CFG.gradient_accumulation_steps > 1:
            loss = loss / CFG.gradient_accumulation_steps
        if (step + 1) % CFG.gradient_accumulation_steps == 0:
            optimizer.step()


train_loader = DataLoader(train_dataset, batch_size=CFG.batch_size, shuffle=True)
valid_loader = DataLoader(valid_dataset, batch_size=CFG.valid_batch_size)
