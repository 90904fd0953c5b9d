//! Adam (1412.6980) with weights that shrink (1711.05101).

/// First and second moments of the gradient.
pub struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

impl Adam {
    pub fn new(weights: usize) -> Self {
        Self { first: vec![0.0; weights], second: vec![0.0; weights], steps: 0 }
    }

    /// One step downhill by the mean of `gradient`'s `count` samples, which is
    /// zero afterwards.
    pub fn step(
        &mut self,
        weights: &mut [f32],
        gradient: &mut [f32],
        count: usize,
        rate: f32,
        decay: f32,
    ) {
        const KEEP: (f32, f32) = (0.9, 0.99);
        self.steps += 1;
        let unbiased = (1.0 - KEEP.1.powi(self.steps)).sqrt() / (1.0 - KEEP.0.powi(self.steps));
        let (step, shrink) = (rate * unbiased, 1.0 - rate * decay);
        let share = 1.0 / count as f32;
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((weight, gradient), (first, second)) in weights.iter_mut().zip(gradient).zip(moments) {
            let slope = *gradient * share;
            *first = KEEP.0 * *first + (1.0 - KEEP.0) * slope;
            *second = KEEP.1 * *second + (1.0 - KEEP.1) * slope * slope;
            *weight = *weight * shrink - step * *first / (second.sqrt() + 1e-7);
            *gradient = 0.0;
        }
    }
}
