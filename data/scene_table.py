"""The ranges from which every factor of a procedural scene is drawn (scenes.py), for the three domains.

One row per factor: (lo, hi) for synthetic, broad, wild. A factor is drawn uniformly, once per scene, or once per object
where its name starts with "obj_". Every broad range contains the other two.
"""
DOMAINS = ("synthetic", "broad", "wild")

TABLE = {
    # camera: pitch (> 0 looks up), roll and field of view in degrees; back: distance behind the centre as a share of
    # the way to the wall; eye: height as a share of the ceiling's (room) or in metres (court)
    "pitch":       ((-10, 4),     (-25, 10),    (-20, 5)),
    "roll":        ((-2, 2),      (-4, 4),      (-3, 3)),
    "fov":         ((50, 60),     (42, 75),     (45, 70)),
    "back":        ((.5, .85),    (.35, .88),   (.4, .85)),
    "room_eye":    ((.45, .65),   (.3, .75),    (.35, .7)),
    "court_eye":   ((2, 2),       (1, 5.5),     (1.5, 5)),
    # half sides and height in metres; sky: the share of the view that the wall of a court leaves open
    "room_x":      ((1.8, 2.8),   (1.5, 9.),    (2.5, 7.)),
    "room_z":      ((2.2, 3.4),   (1.5, 9.),    (2.5, 7.)),
    "room_top":    ((2.4, 3.2),   (2.2, 7.),    (2.6, 6.)),
    "court_x":     ((8, 8),       (6, 20),      (8, 18)),
    "court_z":     ((8, 8),       (6, 20),      (8, 18)),
    "sky":         ((0, 0),       (0, .35),     (0, .35)),
    # number of objects; shares of them that rest on the floor, are turned about all axes, are slabs; place: distance
    # as a share of the way to the wall; size as a share of half the view there; squash: shortest over longest axis
    "objects":     ((1, 4.99),    (1, 7.99),    (3, 7.99)),
    "rest":        ((1, 1),       (.4, 1),      (.4, .8)),
    "turned":      ((0, 0),       (0, .3),      (.1, .3)),
    "slabs":       ((0, 0),       (0, .3),      (0, .25)),
    "obj_place":   ((.5, .9),     (.3, .95),    (.35, .95)),
    "obj_size":    ((.2, .45),    (.18, .5),    (.2, .45)),
    "obj_squash":  ((.7, 1),      (.6, 1),      (.65, 1)),
    # share of surfaces with a texture; grain: its feature size as a share of half the view; palette in HSV
    "textured":    ((0, .4),      (0, .7),      (.3, .65)),
    "obj_grain":   ((.3, .6),     (.28, .8),    (.35, .7)),
    "colours":     ((4, 5.99),    (3, 5.99),    (3, 5.99)),
    "saturation":  ((.1, .5),     (0, .62),     (.05, .6)),
    "hues":        ((.1, .6),     (0, 1),       (0, 1)),
    "darkest":     ((.3, .4),     (.08, .4),    (.1, .25)),
    "lightest":    ((.75, .9),    (.7, .97),    (.85, .97)),
    # ambient share; warmth of the key light, coolness of the ambient light, tint of both in log units; sun in
    # degrees above the horizon; lamp: height as a share of the ceiling, distance from the middle of the room
    "ambient":     ((.45, .7),    (.12, .75),   (.15, .4)),
    "warm":        ((0, .2),      (-.5, .8),    (.1, .7)),
    "cool":        ((-.1, .1),    (-.6, .9),    (.1, .7)),
    "tint":        ((0, .05),     (0, .3),      (0, .1)),
    "sun":         ((45, 45),     (10, 85),     (20, 70)),
    "lamp_up":     ((.8, .9),     (.2, .95),    (.3, .9)),
    "lamp_out":    ((0, .4),      (0, .9),      (0, .8)),
    # camera response: mean linear value, log white balance, gamma, contrast, noise standard deviation
    "exposure":    ((.2, .26),    (.08, .4),    (.12, .35)),
    "balance":     ((0, 0),       (0, .25),     (0, .2)),
    "gamma":       ((1, 1),       (.75, 1.35),  (.8, 1.25)),
    "contrast":    ((0, 0),       (-.4, .8),    (-.3, .7)),
    "noise":       ((0, 0),       (0, .015),    (.003, .01)),
}
OUTDOOR = {"synthetic": 0., "broad": .5, "wild": .85}     # probability of a court instead of a room
