"""Results of runs as a sweep stores them, made up."""


def fake_result(*dices, chosen="baseline", component=0.02):
    """One test Dice per stage; with the largest component more, of the chosen weights less."""
    names = ["baseline", *(f"round_{n}" for n in range(1, len(dices)))]

    def scores(dice):
        return {
            "mean_dice": dice,
            "dice_per_class": {"RV": dice - 0.1, "LV": dice + 0.1},
            "mean_hausdorff95_mm": 10 * dice,
        }

    stages = {
        name: {
            "test": scores(dice - 0.05),
            "test_last": scores(dice) | {"largest_component": scores(dice + component)},
            "seconds": {"train": 60.0, "validate": 7.0},
            "slices": 2000,
        }
        for name, dice in zip(names, dices, strict=True)
    }
    return {"class_names": ["RV", "LV"], "results": stages, "chosen": chosen}
