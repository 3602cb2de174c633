//! Which path a running migration should be on: the flag, the peer's veto, this node's own troubles and the operator, over time.
//!
//! # States and invariants
//! The machine knows the path that the data is on, when it came there, and since when v3 has been allowed without a break.
//! - v3 is left as soon as anything forbids it, at most once a second; where it must be left and the second is not over, it is
//!   [`leaving`](PathChoice::leaving): nothing is sent meanwhile.
//! - v3 is entered only after it has been allowed for `patience` without a break, unless an operator asks: a flag that flaps does not
//!   make a fleet turn back and forth, and a fleet does not turn as one.
//! - `--path v1` stays v1 whatever the flag says; an operator's later word replaces it.
//! - Nothing here is a reason to leave v3 that a peer can make up: its veto is its own signed word; integrity failures end the
//!   migration elsewhere and never come here.
//!
//! No clock: time is given as the duration since a fixed moment.

use std::fmt;
use std::time::Duration;

use crate::negotiate::Path;

/// At most one change in this time.
pub const LEAST: Duration = Duration::from_secs(1);

/// Why the path changes. The code is stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// This node's flag.
    Flag,
    /// The peer vetoes v3.
    Veto,
    /// The encoder failed on this node.
    Encoder,
    /// This node's memory is short.
    Memory,
    /// This node's processors cannot keep up.
    Cpu,
    /// An operator asked.
    Operator,
    /// The destination's agent came back without what it knew.
    Restarted,
    /// The link's round trip has become too long for a datacenter: the mode changes, not the path.
    LinkFar,
    /// The link carries too little for a datacenter: likewise.
    LinkSlow,
    /// The link has become a datacenter's: likewise.
    LinkNear,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Cause; 10] = [
        Cause::Flag,
        Cause::Veto,
        Cause::Encoder,
        Cause::Memory,
        Cause::Cpu,
        Cause::Operator,
        Cause::Restarted,
        Cause::LinkFar,
        Cause::LinkSlow,
        Cause::LinkNear,
    ];
    /// Those that change the mode of v3 and leave the path.
    pub const OF_MODE: [Cause; 3] = [Cause::LinkFar, Cause::LinkSlow, Cause::LinkNear];

    /// The stable code, in snake_case.
    pub fn code(self) -> &'static str {
        match self {
            Cause::Flag => "flag",
            Cause::Veto => "peer_veto",
            Cause::Encoder => "breaker_encoder",
            Cause::Memory => "breaker_memory",
            Cause::Cpu => "breaker_cpu",
            Cause::Operator => "operator",
            Cause::Restarted => "peer_restarted",
            Cause::LinkFar => "link_far",
            Cause::LinkSlow => "link_slow",
            Cause::LinkNear => "link_near",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// What this node's flag says of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    /// One on v3 may stay there.
    pub stay: bool,
    /// One on v1 may go to v3 by itself.
    pub enter: bool,
    /// One on v1 may go to v3 if an operator asks.
    pub allow: bool,
    /// The flag's words.
    pub reason: String,
}

/// A change that should be made now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// To this path.
    pub to: Path,
    /// Why, by its stable code.
    pub cause: Cause,
    /// Why, in words.
    pub reason: String,
}

/// See the module.
#[derive(Debug)]
pub struct PathChoice {
    path: Path,
    changed: Option<Duration>,
    permit: Permit,
    veto: Option<String>,
    trouble: Option<(Cause, String)>,
    /// What the caller or an operator fixed.
    fixed: Option<Path>,
    /// An operator has asked for the path that is fixed, and that was not followed yet.
    asked: bool,
    allowed_since: Option<Duration>,
    patience: Duration,
}

impl PathChoice {
    /// The choice of a migration that begins on `path` at `now`. With `fixed` the caller asked for it by name. v3 is entered after
    /// `patience` without a reason against it.
    pub fn new(path: Path, fixed: Option<Path>, permit: Permit, patience: Duration, now: Duration) -> Self {
        let mut choice = PathChoice {
            path,
            changed: None,
            permit,
            veto: None,
            trouble: None,
            fixed,
            asked: false,
            allowed_since: None,
            patience,
        };
        choice.note(now);
        choice
    }

    /// The path that the data is on.
    pub fn path(&self) -> Path {
        self.path
    }

    /// The flag speaks.
    pub fn permit(&mut self, permit: Permit, now: Duration) {
        self.permit = permit;
        self.note(now);
    }

    /// The peer vetoes v3, with its words, or does no longer.
    pub fn veto(&mut self, veto: Option<String>, now: Duration) {
        self.veto = veto;
        self.note(now);
    }

    /// This node cannot go on with v3, or can again.
    pub fn trouble(&mut self, trouble: Option<(Cause, String)>, now: Duration) {
        self.trouble = trouble;
        self.note(now);
    }

    /// A trouble of this kind is over.
    pub fn lifted(&mut self, cause: Cause, now: Duration) {
        if self.trouble.as_ref().is_some_and(|(trouble, _)| *trouble == cause) {
            self.trouble(None, now);
        }
    }

    /// An operator asks for a path.
    ///
    /// # Errors
    /// v3 is asked for and something forbids it; in words.
    pub fn ask(&mut self, path: Path) -> Result<(), String> {
        if path == Path::V3
            && let Some((_, why)) = self.against_asking()
        {
            return Err(why);
        }
        self.fixed = Some(path);
        self.asked = path != self.path;
        Ok(())
    }

    /// The change that should be made now, if any.
    pub fn poll(&self, now: Duration) -> Option<Change> {
        let change = self.wanted(now)?;
        (self.wait(now) == Duration::ZERO).then_some(change)
    }

    /// Whether something forbids the v3 that the data is on: nothing more should be sent on it, though the change may have to wait.
    pub fn leaving(&self) -> bool {
        self.path == Path::V3 && self.against_staying().is_some()
    }

    /// When to ask again, if nothing else happens before: `None` if only a new input can change anything.
    pub fn next_poll(&self, now: Duration) -> Option<Duration> {
        if self.wanted(now).is_some() {
            return Some(self.wait(now));
        }
        let since = self.allowed_since.filter(|_| self.path == Path::V1 && self.fixed != Some(Path::V1))?;
        Some((since + self.patience).saturating_sub(now))
    }

    /// The data is on `path` from now on.
    pub fn changed(&mut self, path: Path, now: Duration) {
        self.path = path;
        self.changed = Some(now);
        self.asked = false;
        self.note(now);
    }

    /// How long the last change still forbids the next one.
    fn wait(&self, now: Duration) -> Duration {
        self.changed.map_or(Duration::ZERO, |changed| (changed + LEAST).saturating_sub(now))
    }

    fn wanted(&self, now: Duration) -> Option<Change> {
        match self.path {
            Path::V3 => {
                let (cause, reason) = self.against_staying()?;
                Some(Change { to: Path::V1, cause, reason })
            }
            Path::V1 if self.fixed == Some(Path::V1) => None,
            Path::V1 if self.asked => self.against_asking().is_none().then(|| Change {
                to: Path::V3,
                cause: Cause::Operator,
                reason: "an operator asked for v3".to_owned(),
            }),
            Path::V1 => {
                let since = self.allowed_since?;
                (now >= since + self.patience).then(|| Change {
                    to: Path::V3,
                    cause: Cause::Flag,
                    reason: self.permit.reason.clone(),
                })
            }
        }
    }

    fn against_staying(&self) -> Option<(Cause, String)> {
        if self.asked && self.fixed == Some(Path::V1) {
            return Some((Cause::Operator, "an operator asked for v1".to_owned()));
        }
        if !self.permit.stay {
            return Some((Cause::Flag, self.permit.reason.clone()));
        }
        self.others()
    }

    fn against_entering(&self) -> Option<(Cause, String)> {
        if !self.permit.enter {
            return Some((Cause::Flag, self.permit.reason.clone()));
        }
        self.others()
    }

    fn against_asking(&self) -> Option<(Cause, String)> {
        if !self.permit.allow {
            return Some((Cause::Flag, self.permit.reason.clone()));
        }
        self.others()
    }

    fn others(&self) -> Option<(Cause, String)> {
        let veto = self.veto.as_ref().map(|why| (Cause::Veto, format!("the peer vetoes v3: {why}")));
        veto.or_else(|| self.trouble.clone())
    }

    /// Keeps the time since when nothing forbids v3.
    fn note(&mut self, now: Duration) {
        match self.against_entering() {
            Some(_) => self.allowed_since = None,
            None => self.allowed_since = self.allowed_since.or(Some(now)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(100);

    fn permit(on: bool) -> Permit {
        Permit { stay: on, enter: on, allow: on, reason: if on { "flag on" } else { "flag off" }.to_owned() }
    }

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    fn on_v3() -> PathChoice {
        PathChoice::new(Path::V3, None, permit(true), PATIENCE, Duration::ZERO)
    }

    #[test]
    fn a_flag_that_goes_off_is_obeyed_at_once_and_a_return_is_patient() {
        let mut choice = on_v3();
        assert_eq!(choice.poll(seconds(5.0)), None);
        choice.permit(permit(false), seconds(5.0));
        let change = choice.poll(seconds(5.0)).unwrap();
        assert_eq!((change.to, change.cause, change.reason.as_str()), (Path::V1, Cause::Flag, "flag off"));
        assert!(choice.leaving());
        choice.changed(Path::V1, seconds(5.0));
        assert!(!choice.leaving());
        choice.permit(permit(true), seconds(10.0));
        assert_eq!(choice.poll(seconds(109.9)), None);
        assert_eq!(choice.next_poll(seconds(109.0)), Some(seconds(1.0)));
        assert_eq!(choice.poll(seconds(110.0)).unwrap().to, Path::V3);
        // A break begins the wait anew.
        choice.veto(Some("excluded".into()), seconds(50.0));
        choice.veto(None, seconds(60.0));
        assert_eq!(choice.poll(seconds(110.0)), None);
        assert_eq!(choice.poll(seconds(160.0)).unwrap().to, Path::V3);
    }

    #[test]
    fn a_lapsed_lease_keeps_running_migrations_but_lets_none_enter() {
        let lapsed = Permit { stay: true, enter: false, allow: false, reason: "lease".into() };
        let mut choice = on_v3();
        choice.permit(lapsed.clone(), seconds(1.0));
        assert_eq!(choice.poll(seconds(500.0)), None);
        let mut choice = PathChoice::new(Path::V1, None, lapsed, PATIENCE, Duration::ZERO);
        assert_eq!((choice.poll(seconds(500.0)), choice.next_poll(seconds(500.0))), (None, None));
        assert_eq!(choice.ask(Path::V3), Err("lease".to_owned()));
        // The flag is on again, and the node waits before it returns by itself.
        let waiting = Permit { stay: true, enter: false, allow: true, reason: "on".into() };
        choice.permit(waiting, seconds(500.0));
        assert_eq!(choice.poll(seconds(900.0)), None);
        choice.ask(Path::V3).unwrap();
        assert_eq!(choice.poll(seconds(900.0)).unwrap().cause, Cause::Operator);
    }

    #[test]
    fn an_operator_is_obeyed_within_what_is_allowed() {
        let mut choice = on_v3();
        choice.ask(Path::V1).unwrap();
        assert_eq!(choice.poll(seconds(1.0)).unwrap().cause, Cause::Operator);
        choice.changed(Path::V1, seconds(1.0));
        assert_eq!(choice.poll(seconds(900.0)), None, "it stays where the operator put it");
        choice.ask(Path::V3).unwrap();
        assert_eq!(choice.poll(seconds(1.5)), None, "one change a second");
        assert_eq!(choice.next_poll(seconds(1.5)), Some(seconds(0.5)));
        assert_eq!(choice.poll(seconds(2.0)).unwrap().to, Path::V3);
        // The flag is above the operator's wish for v3.
        choice.changed(Path::V3, seconds(2.0));
        choice.permit(permit(false), seconds(3.0));
        assert_eq!(choice.poll(seconds(3.0)).unwrap().cause, Cause::Flag);
    }

    #[test]
    fn v1_by_name_stays_v1() {
        let choice = PathChoice::new(Path::V1, Some(Path::V1), permit(true), PATIENCE, Duration::ZERO);
        assert_eq!((choice.poll(seconds(1e6)), choice.next_poll(seconds(1e6))), (None, None));
    }

    #[test]
    fn codes_are_unique() {
        let mut codes: Vec<_> = Cause::ALL.iter().map(|cause| cause.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Cause::ALL.len());
    }

    proptest! {
        /// Whatever flaps: at most one change a second, never on v3 for longer than that against a word, never into v3 early.
        #[test]
        fn it_never_flaps(events in prop::collection::vec((0u64..400, 0u8..6), 1..200)) {
            let mut choice = on_v3();
            let mut now = Duration::ZERO;
            let (mut last, mut allowed) = (None::<Duration>, Some(Duration::ZERO));
            let (mut flag, mut veto, mut trouble) = (true, false, false);
            for (step, event) in events {
                now += Duration::from_millis(step);
                match event {
                    0 => { flag = false; choice.permit(permit(false), now) }
                    1 => { flag = true; choice.permit(permit(true), now) }
                    2 => { veto = true; choice.veto(Some("no".into()), now) }
                    3 => { veto = false; choice.veto(None, now) }
                    4 => { trouble = true; choice.trouble(Some((Cause::Memory, "short".into())), now) }
                    _ => { trouble = false; choice.trouble(None, now) }
                }
                let free = flag && !veto && !trouble;
                allowed = if free { allowed.or(Some(now)) } else { None };
                if let Some(change) = choice.poll(now) {
                    prop_assert!(last.is_none_or(|last| now >= last + LEAST));
                    prop_assert!(change.to != choice.path());
                    if change.to == Path::V3 {
                        prop_assert!(allowed.is_some_and(|since| now >= since + PATIENCE));
                    }
                    choice.changed(change.to, now);
                    last = Some(now);
                }
                let settled = last.is_none_or(|last| now >= last + LEAST);
                prop_assert!(free || !settled || choice.path() == Path::V1);
            }
        }
    }
}
