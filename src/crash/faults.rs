//! Every operation of a save refused in turn.

use super::record::Fault;
use super::scenarios::SCENARIOS;
use super::*;
use crate::work::each_in_parallel;
use std::sync::Mutex;

/// What a save makes of one refused operation. Returns whether there was one.
fn refuse(scenario: &Scenario, kind: Kind, fault: Fault, report: &mut Report) -> bool {
    let dir = scratch();
    (scenario.prepare)(dir.path());
    let before = names_in(dir.path());
    let (done, log) =
        record(dir.path(), kind, Some(fault), |saved| (scenario.save)(dir.path(), scenario.old + 1, saved));
    let Some(refused) = log.refused else {
        done.unwrap();
        return false;
    };
    let text = |what: &str| format!("{}, {kind:?}, {fault:?} ({refused}): {done:?}: {what}", scenario.name);
    let saved = log.saved();
    let last = saved.unwrap_or(scenario.old);
    let found = (scenario.read)(dir.path());
    let right = match &done {
        Ok(()) => found == Ok(last),
        Err(Error::Io { source, .. }) => {
            // What a new model was to replace may refuse to go, and be beside it. What was removed may be back after a
            // power loss, where the directory refuses to be synced.
            let either = ["remove", "sync directory"].contains(&refused) && found == Ok(last + 1);
            source.raw_os_error() == Some(fault.errno) && (found == Ok(last) || either)
        }
        // What was to go is still there, beside what was saved.
        Err(Error::NotDurable { .. } | Error::NotRemoved { .. }) => {
            found == Ok(last) || found == Ok(last + 1)
        }
        Err(_) => false,
    };
    if !right {
        report.violations.push(text(&format!("found {found:?}")));
    }
    let after = names_in(dir.path());
    let temporaries = after.iter().filter(|name| name.starts_with(".maptensors-")).count();
    // What cannot be removed stays (a file's, and that of the index beside it); everything else goes.
    let may_stay = refused == "remove" || fault.for_good;
    // All shards of a checkpoint are staged before the first is committed, and an index is marked before its file comes.
    let most = if fault.for_good { 2 } else { usize::from(may_stay) };
    if temporaries > most {
        report.violations.push(text(&format!("leaves temporaries: {after:?}")));
    }
    // An index that is in place and perhaps not durable, beside the file that it is to replace, says so.
    let in_place = matches!(&done, Err(Error::NotDurable { path, .. }) if path.exists());
    if done.is_err() && !in_place && found == Ok(scenario.old) && !may_stay && after != before {
        report.violations.push(text(&format!("leaves {after:?} of {before:?}")));
    }
    // Power fails on top of it. Which errno it was makes no difference to the disk.
    if fault.errno != libc::EIO {
        return true;
    }
    let inner = scenario.check(&log, Budget::nested(), 0);
    report.states += inner.states;
    report.violations.extend(inner.violations.iter().map(|what| text(&format!("then a crash: {what}"))));
    true
}

#[test]
fn any_operation_may_fail_and_nothing_is_lost_or_left_behind() {
    let violations = Mutex::new(Vec::new());
    let refuse_each = |scenario: &Scenario| {
        let (mut report, mut refused) = (Report::default(), 0);
        for errno in [libc::EIO, libc::ENOSPC, libc::EINTR] {
            for for_good in [false, true] {
                // Which errno it was makes no difference to the way on, and that is what differs by kind.
                let kinds = if errno == libc::EIO { &Kind::ALL[..] } else { &[Kind::KEEPS] };
                for &kind in kinds {
                    for at in 1.. {
                        if !refuse(scenario, kind, Fault { at, errno, for_good }, &mut report) {
                            break;
                        }
                        refused += 1;
                    }
                }
            }
        }
        println!("{:<36} {refused:>4} refusals, {:>7} states behind them", scenario.name, report.states);
        violations.lock().unwrap().append(&mut report.violations);
        assert!(refused > 20, "{}", scenario.name);
        Ok::<(), ()>(())
    };
    each_in_parallel(SCENARIOS.iter().collect(), refuse_each).unwrap();
    let violations = violations.into_inner().unwrap();
    Report { violations, ..Report::default() }.assert_clean("with a fault");
}
