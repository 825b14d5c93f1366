//! What comes first, and how much of what comes last.

use super::*;

type Names = std::sync::mpsc::Sender<&'static str>;

/// An object that notes its name when it is visited.
fn object(
    class: Class,
    home: &LoopHandle,
    log: &Names,
    name: &'static str,
    progress: Progress,
) -> (Strand<()>, Event<()>) {
    let strand = Strand::of_class(class, name, home, ());
    let log = log.clone();
    let event = strand.event(move |(), _| {
        log.send(name).unwrap();
        progress
    });
    (strand, event)
}

#[test]
fn what_is_urgent_comes_next_whatever_waits() {
    let mut event_loop = event_loop();
    let home = event_loop.handle();
    let (log, ran) = channel();
    let (_urgent, alarm) = object(Class::Realtime, &home, &log, "urgent", Progress::Idle);
    let others: Vec<_> = (0..10_000)
        .map(|n| {
            let strand = Strand::new("normal", &home, ());
            let (log, alarm) = (log.clone(), alarm.clone());
            let event = strand.event(move |(), _| {
                log.send("normal").unwrap();
                if n == 5_000 {
                    alarm.schedule();
                    log.send("asked").unwrap();
                }
                Progress::Idle
            });
            event.schedule();
            (strand, event)
        })
        .collect();
    drain(&mut event_loop);
    let ran: Vec<_> = ran.try_iter().collect();
    assert_eq!(ran.len(), others.len() + 2);
    let asked = ran.iter().position(|&name| name == "asked").unwrap();
    assert_eq!(ran[asked + 1], "urgent");
}

#[test]
fn what_is_urgent_without_end_lets_the_others_have_their_turns() {
    let mut event_loop = event_loop();
    let home = event_loop.handle();
    let (log, ran) = channel();
    let (_urgent, again) = object(Class::Realtime, &home, &log, "urgent", Progress::More);
    let others: Vec<_> =
        (0..100).map(|_| object(Class::Normal, &home, &log, "normal", Progress::Idle)).collect();
    again.schedule();
    others.iter().for_each(|(_, event)| event.schedule());
    drain(&mut event_loop);
    let ran: Vec<_> = ran.try_iter().collect();
    assert_eq!(ran.iter().filter(|&&name| name == "normal").count(), others.len());
    // Between two others: the budget, and what the phase of those that are urgent begins with.
    let runs = ran.rsplit(|&name| name == "normal").skip(1);
    let longest = runs.map(<[_]>::len).max().unwrap();
    assert!(longest <= URGENT_BUDGET as usize + 1, "{longest} in a row");
}

#[test]
fn service_has_its_share_of_every_turn() {
    let mut event_loop = event_loop();
    let home = event_loop.handle();
    let (log, ran) = channel();
    let busy: Vec<_> =
        (0..300).map(|_| object(Class::Normal, &home, &log, "normal", Progress::More)).collect();
    let service: Vec<_> =
        (0..200).map(|_| object(Class::Service, &home, &log, "service", Progress::More)).collect();
    busy.iter().chain(&service).for_each(|(_, event)| event.schedule());
    let shuffled = event_loop.shuffle.is_some();
    let most = SERVICE_BUDGET as usize;
    for turn in 0..50 {
        event_loop.turn();
        let ran: Vec<_> = ran.try_iter().collect();
        let share = ran.iter().filter(|&&name| name == "service").count();
        // What is left of a batch is served before more is fetched.
        assert!((1..=most).contains(&share), "{share} in turn {turn}");
        assert!(shuffled || turn > 0 || share == most);
        assert!(ran.len() > share, "and the others too");
        let first = ran.iter().position(|&name| name == "service").unwrap();
        assert_eq!(first, ran.len() - share, "it comes last");
    }
    // With nobody else about it has all of it.
    drop(busy);
    (0..400).for_each(|_| event_loop.turn());
    ran.try_iter().for_each(drop);
    (0..50).for_each(|_| event_loop.turn());
    let share = ran.try_iter().count();
    assert!(share > 50 * most, "{share}");
}

#[test]
fn what_is_urgent_and_was_left_over_is_still_urgent() {
    let mut event_loop = event_loop();
    let home = event_loop.handle();
    let (log, ran) = channel();
    let many = PHASE_BUDGET as usize + 100;
    let urgent: Vec<_> =
        (0..many).map(|_| object(Class::Realtime, &home, &log, "urgent", Progress::Idle)).collect();
    let others: Vec<_> =
        (0..50).map(|_| object(Class::Normal, &home, &log, "normal", Progress::Idle)).collect();
    others.iter().chain(&urgent).for_each(|(_, event)| event.schedule());
    drain(&mut event_loop);
    let ran: Vec<_> = ran.try_iter().collect();
    for (nth, run) in ran.split(|&name| name == "urgent").enumerate() {
        assert!(run.len() <= 1 || nth == many, "{} that are not urgent pass it", run.len());
    }
}
