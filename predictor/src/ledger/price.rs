//! The switch of one layer's prefetching: on while it saves time, off where it
//! loses, tried again later.

/// Settings of the switches. Time is counted in tokens.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Pricing {
    /// Tokens after which a gain or loss counts `1/e`.
    pub window_tokens: f64,
    /// Settled prefetches (decayed like the balance) before a verdict.
    pub evidence: f64,
    /// Tokens without prefetching after the first verdict against it. Doubles
    /// with every verdict up to the longest.
    pub first_pause: u64,
    pub longest_pause: u64,
    /// What a useless byte costs even when the link would have been idle, as a
    /// share of its time on the link: memory bandwidth and kernel time.
    pub surcharge: f64,
    /// Bytes after which the link's speed is believed to have changed.
    pub link_window_bytes: f64,
}

impl Default for Pricing {
    fn default() -> Self {
        Self {
            window_tokens: 64.0,
            evidence: 12.0,
            first_pause: 64,
            longest_pause: 4096,
            surcharge: 0.05,
            link_window_bytes: 1e9,
        }
    }
}

impl Pricing {
    /// For chunks of prompts, of which there are few and each has many experts:
    /// time is counted in chunks.
    pub fn of_chunks() -> Self {
        let (window_tokens, first_pause, longest_pause) = (8.0, 8, 256);
        Self { window_tokens, first_pause, longest_pause, ..Self::default() }
    }
}

/// Decides for one layer. Deterministic in what it is told.
#[derive(Clone, Debug)]
pub struct Switch {
    balance_ns: f64,
    evidence: f64,
    /// Tokens left without prefetching; 0: on.
    paused: u64,
    next_pause: u64,
    /// Tokens that it was on since the last verdict against it.
    on_for: u64,
    switched_off: u64,
}

impl Switch {
    pub fn new(pricing: &Pricing) -> Self {
        Self {
            balance_ns: 0.0,
            evidence: 0.0,
            paused: 0,
            next_pause: pricing.first_pause.max(1),
            on_for: 0,
            switched_off: 0,
        }
    }

    pub fn on(&self) -> bool {
        self.paused == 0
    }

    pub fn switched_off(&self) -> u64 {
        self.switched_off
    }

    pub fn balance_ns(&self) -> f64 {
        self.balance_ns
    }

    /// A prefetch turned out to have gained (or lost) this.
    pub fn settled(&mut self, gain_ns: f64) {
        self.balance_ns += gain_ns;
        self.evidence += 1.0;
    }

    /// Forecasting itself took this long for one token: some evidence even
    /// where it leads to no prefetch.
    pub fn spent(&mut self, cost_ns: f64) {
        self.balance_ns -= cost_ns;
        self.evidence += 0.5;
    }

    /// A token is done.
    pub fn next_token(&mut self, pricing: &Pricing) {
        if self.paused > 0 {
            self.paused -= 1;
            if self.paused == 0 {
                // What was in flight at the verdict does not count in the
                // next trial.
                (self.balance_ns, self.evidence, self.on_for) = (0.0, 0.0, 0);
            }
            return;
        }
        self.on_for += 1;
        if self.evidence >= pricing.evidence && self.balance_ns <= 0.0 {
            self.switched_off += 1;
            self.paused = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(pricing.longest_pause).max(1);
            return;
        }
        if self.on_for as f64 > 4.0 * pricing.window_tokens && self.balance_ns > 0.0 {
            // It paid for long: earlier failures are forgotten.
            self.next_pause = pricing.first_pause.max(1);
        }
        let keep = (-1.0 / pricing.window_tokens.max(1.0)).exp();
        self.balance_ns *= keep;
        self.evidence *= keep;
    }
}
