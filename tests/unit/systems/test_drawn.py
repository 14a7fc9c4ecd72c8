"""Drawing from noise within training, as far as the step that is learnt from."""

import pytest
import torch
from diffusers import DDIMScheduler

from imprompt.core.randomness import Randomness
from imprompt.diffusion.objectives import predicted_clean
from imprompt.systems.denoising import Denoising
from imprompt.systems.drawn import drawn_clean, drawn_steps

NUM_STEPS, MIN_SIGNAL, SHAPE = 8, 0.02, (2, 3, 3)


def scheduler(prediction_type="v_prediction"):
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
    )


@pytest.fixture
def denoising():
    return Denoising(scheduler(), torch.device("cpu"))


def test_each_stops_at_any_step_that_shows_something(denoising):
    count = 6000
    timesteps, stops = drawn_steps(
        denoising, Randomness(0, range(count)), NUM_STEPS, min_signal=MIN_SIGNAL
    )
    assert (timesteps.diff(dim=1) < 0).all() and 0 <= timesteps.min() <= timesteps.max() < 1000
    assert timesteps[:, 0].min() > 1000 * (1 - 0.6 / NUM_STEPS)
    signal = denoising.alphas[timesteps]
    shown = signal > MIN_SIGNAL
    assert shown[torch.arange(count), stops].all() and not shown.all()
    expected = (shown / shown.sum(1, keepdim=True)).mean(0)
    found = torch.bincount(stops, minlength=NUM_STEPS) / count
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    # Where nothing shows anything, it is the last.
    _, stops = drawn_steps(denoising, Randomness(0, range(9)), NUM_STEPS, min_signal=1.0)
    assert (stops == NUM_STEPS - 1).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_is_drawn_as_ddim_draws(prediction_type):
    """Against diffusers' steps, which go on by as many timesteps, with a denoiser that is not linear."""

    def denoise(noisy, timesteps):
        return torch.sin(3 * noisy) + timesteps.reshape(-1, 1, 1, 1) / 1000

    denoising = Denoising(scheduler(prediction_type), torch.device("cpu"))
    randomness = Randomness(5, range(7))
    drawn = drawn_clean(
        lambda noisy, timesteps, _: denoise(noisy, timesteps),
        denoising,
        randomness,
        SHAPE,
        num_steps=NUM_STEPS,
        min_signal=MIN_SIGNAL,
    )
    timesteps, stops = drawn_steps(denoising, randomness, NUM_STEPS, MIN_SIGNAL)
    assert len(stops.unique()) > 2
    noise = randomness.normal("drawn: noise", SHAPE)
    for row, (times, stop) in enumerate(zip(timesteps, stops.tolist(), strict=True)):
        ddim = scheduler(prediction_type)
        ddim.set_timesteps(NUM_STEPS)
        noisy = noise[row : row + 1]
        for time in times[:stop]:
            noisy = ddim.step(denoise(noisy, time[None]), int(time), noisy).prev_sample
        time = times[stop][None]
        prediction = denoise(noisy, time)
        clean = predicted_clean(prediction_type, prediction, noisy, denoising.alphas[time])
        torch.testing.assert_close(drawn[row : row + 1], clean, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_last_prediction_alone(denoising):
    weight = torch.ones((), requires_grad=True)
    asked = []

    def predict(noisy, timesteps, rows):
        asked.append((torch.is_grad_enabled(), noisy.detach().clone(), timesteps, rows))
        assert not noisy.requires_grad
        return weight * noisy

    clean = drawn_clean(
        predict, denoising, Randomness(0, range(5)), SHAPE, num_steps=NUM_STEPS, min_signal=0.3
    )
    *before, (has_gradient, noisy, timesteps, rows) = asked
    assert has_gradient and rows == [0, 1, 2, 3, 4]
    assert before and not any(one[0] for one in before)
    (gradient,) = torch.autograd.grad(clean.sum(), weight)
    # x0 = √ᾱ x - √(1 - ᾱ) v, and here v = weight · x.
    rate = (1 - denoising.alphas[timesteps]).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, -(rate * noisy).sum())


def test_what_is_drawn_does_not_depend_on_the_batch(denoising):
    strength = torch.tensor([0.1, 0.5, 0.9, 0.3])

    def drawn(rows):
        def predict(noisy, timesteps, some):
            told = strength[[rows[row] for row in some]].reshape(-1, 1, 1, 1)
            return told * noisy + timesteps.reshape(-1, 1, 1, 1) / 1000

        randomness = Randomness(3, range(4)).of(rows)
        return drawn_clean(
            predict, denoising, randomness, SHAPE, num_steps=NUM_STEPS, min_signal=MIN_SIGNAL
        )

    torch.testing.assert_close(drawn([0, 1, 2, 3])[[2, 0]], drawn([2, 0]))
